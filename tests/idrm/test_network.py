"""Local models and data are nobody else's business."""

import socket

from idrm.train import main


def test_a_run_on_local_files_asks_nothing_of_the_network(
    tmp_path, monkeypatch, student_path, teacher_path, pairs_path, eval_pairs_path
):
    asked = []
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def note_name(host, *arguments, **options):
        asked.append(host)
        return resolve(host, *arguments, **options)

    def note_address(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            asked.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", note_name)
    monkeypatch.setattr(socket.socket, "connect", note_address)
    flags = {
        "model_name_or_path": student_path,
        "teacher_name_or_path": teacher_path,
        "dataset_name": pairs_path,
        "eval_dataset_name": eval_pairs_path,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    main([token for name, value in flags.items() for token in (f"--{name}", str(value))])
    assert (tmp_path / "out" / "config.json").exists()
    assert asked == []
