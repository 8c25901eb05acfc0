"""Local models and data are nobody else's business."""

from idrm.train import main


def test_a_run_on_local_files_asks_nothing_of_the_network(
    tmp_path, asked_of_the_network, student_path, teacher_path, pairs_path, eval_pairs_path
):
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
    assert asked_of_the_network == []
