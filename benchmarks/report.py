"""Tables and plots of what ``pytest benchmarks`` saved: ``python -m benchmarks.report [FILE ...]``.

Writes into benchmarks/results/<device>/ the tables (report.md), the rows that they show (rows.json) and two plots:
memory and time against the number of tokens. Rows of several files are put together; of two rows of one contest and
variant the later file's counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Contest, workload_fields
from benchmarks.measurement import Measurement

RESULTS = Path(__file__).resolve().parent / "results"
SAVED = Path(".benchmarks")  # where pytest-benchmark keeps what it saves by itself
# Ratios shown, first over second, where both were measured; "fused" is what the device has.
RATIOS = (("naive", "fused"), ("naive-compiled", "fused"), ("torch", "fused"), ("fused", "sdpa"))
FUSED = ("cpp", "triton")


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of one contest, as measured.

    Attributes:
        suite, contest, workload: the table, the contest's name and its fields.
        seconds: median of the rounds; None where it did not run.
        spread: half the distance of the quartiles over the median; None for a single round.
        rounds: how many.
        peak_bytes, needed_bytes, failure: as in Measurement.
        roof_seconds: as in Contest.
    """

    suite: str
    contest: str
    workload: dict[str, Any]
    variant: str
    seconds: float | None
    spread: float | None
    rounds: int
    peak_bytes: int | None
    needed_bytes: int | None
    failure: str | None
    roof_seconds: float | None

    @classmethod
    def of(cls, contest: Contest, variant: str, measurement: Measurement) -> Row:
        seconds = measurement.seconds
        median = statistics.median(seconds) if seconds else None
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else None
        return cls(
            contest.suite,
            contest.name,
            workload_fields(contest),
            variant,
            median,
            (quartiles[2] - quartiles[0]) / 2 / median if quartiles else None,
            len(seconds),
            measurement.peak_bytes,
            measurement.needed_bytes,
            measurement.failure,
            contest.roof_seconds(variant) if seconds else None,
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def time_text(self) -> str:
        """The median in milliseconds and the spread, or why there is none."""
        if self.failure is not None:
            return "wrong"
        if self.seconds is None:
            return "out of memory"
        spread = "" if self.spread is None else f" ±{100 * self.spread:.0f}%"
        return _three_digits(self.seconds * 1e3) + spread

    @property
    def memory_text(self) -> str:
        if self.failure is not None:
            return "wrong"
        if self.seconds is None:
            return f"would need {_three_digits(self.needed_bytes / 2**20)}"
        return _three_digits(self.peak_bytes / 2**20)


def tables(rows: Iterable[Row]) -> str:
    """Markdown: for every suite and device a table of times, with ratios, and one of peak memory."""
    texts = []
    for (suite, device), group in _grouped(rows, lambda row: (row.suite, row.workload["device"])):
        contests = [list(members) for _, members in _grouped(group, lambda row: row.contest)]
        variants = list(dict.fromkeys(row.variant for row in group))
        shown = _ratio_table if suite == "op" else _share_table
        texts.append(f"### {TITLES[suite]}, {device}\n\n{shown(contests, variants)}")
    failures = [f"- {row.contest}, {row.variant}: {row.failure}" for row in rows if row.failure is not None]
    if failures:
        texts.append("### No number is given for\n\n" + "\n".join(failures))
    return "\n\n".join(texts)


TITLES = {"op": "The loss", "training_step": "A training step"}


def _ratio_table(contests: Sequence[Sequence[Row]], variants: Sequence[str]) -> str:
    """Times, ratios and peak memory of the op."""
    fused = next((name for name in FUSED if name in variants), None)
    ratios = [tuple(fused if name == "fused" else name for name in pair) for pair in RATIOS if fused]
    ratios = [pair for pair in ratios if set(pair) <= set(variants)]
    times = [["contest", *variants, *(f"{a} / {b}" for a, b in ratios), f"{fused}, share of roof"]]
    memory = [["contest", *variants]]
    for members in contests:
        by_variant = {row.variant: row for row in members}
        cells = [by_variant[name].time_text if name in by_variant else "" for name in variants]
        quotients = []
        for pair in ratios:
            seconds = [by_variant[name].seconds if name in by_variant else None for name in pair]
            quotients.append("" if None in seconds else f"{seconds[0] / seconds[1]:.2f}")
        own = by_variant.get(fused)
        share = (
            "" if own is None or not own.seconds or not own.roof_seconds else f"{own.roof_seconds / own.seconds:.2f}"
        )
        times.append([members[0].contest, *cells, *quotients, share])
        memory.append(
            [members[0].contest, *(by_variant[name].memory_text if name in by_variant else "" for name in variants)]
        )
    return f"Time, ms\n\n{_markdown(times)}\n\nPeak memory over the inputs, MiB\n\n{_markdown(memory)}"


def _share_table(contests: Sequence[Sequence[Row]], variants: Sequence[str]) -> str:
    """What every step of a ladder adds to the first one."""
    times, memory = [["contest", *variants]], [["contest", *variants]]
    for members in contests:
        by_variant = {row.variant: row for row in members}
        first = members[0]
        time_cells, memory_cells = [], []
        for name in variants:
            row = by_variant.get(name)
            time_cells.append("" if row is None else row.time_text)
            memory_cells.append("" if row is None else row.memory_text)
            if row is not None and row is not first and row.seconds and first.seconds:
                layers = row.workload.get("scaled_layers", 1)
                time_cells[-1] += f" ({100 * (row.seconds / first.seconds - 1) / layers:+.1f}%)"
                memory_cells[-1] += f" ({100 * (row.peak_bytes / first.peak_bytes - 1):+.1f}%)"
        times.append([first.contest, *time_cells])
        memory.append([first.contest, *memory_cells])
    return f"Time, ms\n\n{_markdown(times)}\n\nPeak memory over the inputs, MiB\n\n{_markdown(memory)}"


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of a line through (tokens, value) on log axes at the three largest numbers of tokens."""
    largest = sorted(points)[-3:]
    if len(largest) < 2:
        return None
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in largest), strict=True)).slope


def _grouped(rows: Iterable[Row], key) -> list[tuple[Any, list[Row]]]:
    """Groups in order of appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - max(0, math.floor(math.log10(max(value, 1e-9)))))}f}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body))


def plot(rows: Sequence[Row], quantity: str, path: Path, title: str) -> None:
    """Time or memory of loss and gradients against the pair's tokens, a panel for each dtype and shape, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain = {"passes": "forward_backward", "teacher": "packed", "units": "tokens", "normalization": "block"}
    rows = [
        row
        for row in rows
        if row.suite == "op"
        and row.failure is None
        and row.workload["num_kv_heads"] is None
        and all(row.workload[name] == value for name, value in plain.items())
    ]
    panels = _grouped(rows, lambda row: (row.workload["dtype"], row.workload["num_heads"], row.workload["head_dim"]))
    figure, axes = pyplot.subplots(
        1,
        max(1, len(panels)),
        figsize=(4.6 * max(1, len(panels)), 4.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, ((dtype, num_heads, head_dim), members) in zip(axes[0], panels, strict=False):
        for index, (variant, line) in enumerate(_grouped(members, lambda row: row.variant)):
            line = sorted(line, key=lambda row: row.workload["length"])
            color = f"C{VARIANT_ORDER.index(variant) if variant in VARIANT_ORDER else index}"
            measured = [(2 * row.workload["length"], _quantity(row, quantity)) for row in line if row.seconds]
            if not measured:
                continue
            slope = exponent(measured)
            label = variant if slope is None else f"{variant} ~ N^{slope:.1f}"
            axis.plot(*zip(*measured, strict=True), marker="o", color=color, label=label)
            if quantity == "memory":
                foretold = [(2 * row.workload["length"], row.needed_bytes / 2**20) for row in line if row.needed_bytes]
                if foretold:
                    axis.plot(*zip(*foretold, strict=True), "o--", color=color, fillstyle="none")
            elif variant in FUSED:
                roof = [(2 * row.workload["length"], row.roof_seconds * 1e3) for row in line if row.roof_seconds]
                if roof:
                    axis.plot(*zip(*roof, strict=True), ":", color=color, label=f"roof of {variant}")
        axis.set(
            xscale="log", yscale="log", xlabel="tokens of the pair", title=f"{dtype}, {num_heads} heads of {head_dim}"
        )
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("time, ms" if quantity == "time" else "peak memory over the inputs, MiB")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


VARIANT_ORDER = ("naive", "naive-compiled", "torch", "cpp", "triton", "sdpa")


def _quantity(row: Row, quantity: str) -> float:
    return row.seconds * 1e3 if quantity == "time" else row.peak_bytes / 2**20


def read(path: Path) -> dict[str, Any]:
    """A saved file: "rows", "machine" and "date". Raises ValueError for any other file."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in saved["rows"]]
        machine = saved["machine"] if "machine" in saved else saved["machine_info"]["idrm"]
        return {"rows": rows, "machine": machine, "date": saved.get("date") or saved["datetime"][:10]}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that `pytest benchmarks` saved") from error


def write(saved: Sequence[dict[str, Any]], results: Path) -> list[Path]:
    """Writes every device's folder; the folders. Descriptions are the last file's: measure again what has changed."""
    merged = {(row.contest, row.variant): row for one in saved for row in one["rows"]}
    machine, date = saved[-1]["machine"], saved[-1]["date"]
    return [
        _write_device(device, rows, machine, date, results)
        for device, rows in _grouped(merged.values(), lambda row: row.workload["device"])
    ]


def _write_device(device: str, rows: Sequence[Row], machine: dict[str, str], date: str, results: Path) -> Path:
    versions = [f"{name} {machine[name]}" for name in ("python", "torch", "triton", "transformers") if name in machine]
    if device == "cpu":
        versions.append(f"instructions {machine['cpu_instructions']}")
    title = f"{machine[device]}; {', '.join(versions)}; {date}, commit {machine['commit']}"
    content = {"machine": machine, "date": date, "rows": [row.as_dict() for row in rows]}
    folder = results / re.sub(r"[^a-z0-9]+", "-", machine[device].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    for name, produce in {
        "report.md": lambda path: path.write_text(f"{title}\n\n{tables(rows)}\n", encoding="utf-8"),
        "rows.json": lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"),
        "memory.png": lambda path: plot(rows, "memory", path, title),
        "time.png": lambda path: plot(rows, "time", path, title),
    }.items():
        temporary = folder / f".{name}.tmp{Path(name).suffix}"
        try:
            produce(temporary)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="saved runs; default: the last one under .benchmarks")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    files = options.files or sorted(SAVED.glob("*/*.json"), key=lambda path: path.stat().st_mtime)[-1:]
    try:
        if not files:
            raise ValueError(f"{SAVED}: nothing saved; run `pytest benchmarks` first")
        folders = write([read(path) for path in files], options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        print(f"The report is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
