"""Tables and plots of what ``pytest benchmarks`` saved: ``python -m benchmarks.report [FILE ...]``.

Writes into benchmarks/results/<device>/ the tables (report.md), the rows that they show (rows.json) and two plots:
memory and time against the number of tokens. Rows of several runs on one machine are put together, and with those that
are there already; of two rows of one contest and variant the later counts. Each keeps its date and commit.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import FUSED, REPEATED, Contest
from benchmarks.machine import commit
from benchmarks.measurement import Measurement

RESULTS = Path(__file__).resolve().parent / "results"
SAVED = Path(".benchmarks")  # where pytest-benchmark keeps what it saves by itself
# The op's variants in the order of their columns.
IMPLEMENTATIONS = ("torch", *FUSED.values())
VARIANTS = ("naive", "naive-compiled", *(f"{name}{end}" for name in IMPLEMENTATIONS for end in ("", REPEATED)), "sdpa")
# Ratios shown, first over second, where both were measured; "fused" is what the device has.
RATIOS = (
    ("naive", "fused"),
    ("naive-compiled", "fused"),
    ("torch", "fused"),
    ("torch-repeated", "torch"),
    ("fused-repeated", "fused"),
    ("fused", "sdpa"),
)
# A training step's baseline, and what is added: (name, variant, the variant without it).
BASELINE = "bradley-terry"
ADDITIONS = (
    ("capture", "capture", BASELINE),
    ("teacher", "teacher", "capture"),
    ("fused loss", "fused", "teacher"),
    ("naive loss", "naive", "teacher"),
    ("all, fused", "fused", BASELINE),
    ("all, cached", "cached", BASELINE),
)
TITLES = {
    "op": "The loss",
    "training_step": "A training step",
    "preference_step": "A training step beside another trainer's",
    "teacher": "The teacher's forward pass",
}
# The other suites' variants in the order of their columns, the first being what the others' times are compared with.
TEACHER_VARIANTS = ("eager", "sdpa", "flashdeberta", "sdpa-half")
PREFERENCE_VARIANTS = ("trl", "two-rows", "shared", "shared-cached", "shared-live")
QUANTITIES = {
    "time": lambda row: row.median * 1e3,
    "memory": lambda row: row.peak_bytes / 2**20,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant of one contest, as measured.

    Attributes:
        suite, contest, workload: the table, the contest's name and its fields.
        seconds: duration of every round; those of a contest's variants belong together, round by round.
        peak_bytes, before_bytes, needed_bytes, failure: as in Measurement.
        roof_seconds: as in Contest.
        date, commit: when, and what was measured.
    """

    suite: str
    contest: str
    workload: dict[str, Any]
    variant: str
    seconds: list[float]
    peak_bytes: int | None
    before_bytes: int | None
    needed_bytes: int | None
    failure: str | None
    roof_seconds: float | None
    date: str
    commit: str

    @classmethod
    def of(cls, contest: Contest, variant: str, measurement: Measurement) -> Row:
        return cls(
            contest.suite,
            contest.name,
            dataclasses.asdict(contest),
            variant,
            measurement.seconds,
            measurement.peak_bytes,
            measurement.before_bytes,
            measurement.needed_bytes,
            measurement.failure,
            contest.roof_seconds(variant) if measurement.seconds else None,
            datetime.date.today().isoformat(),
            commit(),
        )

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def median(self) -> float | None:
        """Of the rounds, in seconds; None where it did not run."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def time_text(self) -> str:
        """The median in milliseconds with half the distance of the quartiles, or why there is none."""
        if self.failure is not None:
            return "wrong"
        if not self.seconds:
            return "does not fit"
        if len(self.seconds) == 1:
            return _three_digits(self.median * 1e3)
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return f"{_three_digits(self.median * 1e3)} ±{50 * (high - low) / self.median:.0f}%"

    @property
    def memory_text(self) -> str:
        """The peak over what was in use before in MiB, or what it would be."""
        if self.failure is not None:
            return "wrong"
        if not self.seconds:
            return f"needs {_three_digits(self.needed_bytes / 2**20)} or more"
        return _three_digits(self.peak_bytes / 2**20)


def tables(rows: Sequence[Row]) -> str:
    """Markdown: for every suite and device a table of times, with ratios, and one of peak memory."""
    texts = []
    for (suite, device), group in _grouped(rows, lambda row: (row.suite, row.workload["device"])):
        contests = [list(members) for _, members in _grouped(group, lambda row: row.contest)]
        shown = {
            "op": _op_tables,
            "training_step": _step_tables,
            "preference_step": _preference_tables,
            "teacher": _teacher_tables,
        }[suite]
        texts.append(f"### {TITLES[suite]}, {device}\n\n{shown(contests)}")
    failures = [f"- {row.contest}, {row.variant}: {row.failure}" for row in rows if row.failure is not None]
    if failures:
        texts.append("### No number is given for\n\n" + "\n".join(failures))
    return "\n\n".join(texts)


def _op_tables(contests: Sequence[Sequence[Row]]) -> str:
    """Times, ratios and peak memory of the loss, and how both grow."""
    named = {row.variant for members in contests for row in members}
    variants = [name for name in VARIANTS if name in named]
    fused = next((name for name in FUSED.values() if name in named), None)
    ratios = [tuple(name.replace("fused", fused or "fused") for name in pair) for pair in RATIOS]
    ratios = [pair for pair in ratios if set(pair) <= named]
    roof_column = [f"{fused}: roof / time"] if fused else []
    times = [["contest", *variants, *(f"{a} / {b}" for a, b in ratios), *roof_column]]
    memory = [["contest", *variants]]
    for members in contests:
        by_variant = {row.variant: row for row in members}
        medians = {name: row.median for name, row in by_variant.items()}
        quotients = [f"{medians[a] / medians[b]:.2f}" if medians.get(a) and medians.get(b) else "" for a, b in ratios]
        roof = by_variant[fused].roof_seconds if medians.get(fused) else None
        own = [by_variant[name].time_text if name in by_variant else "" for name in variants]
        share = [f"{roof / medians[fused]:.2f}" if roof else ""] if fused else []
        times.append([members[0].contest, *own, *quotients, *share])
        own = [by_variant[name].memory_text if name in by_variant else "" for name in variants]
        memory.append([members[0].contest, *own])
    text = f"Time, ms\n\n{_markdown(times)}\n\nPeak memory over the inputs, MiB\n\n{_markdown(memory)}"
    growth = _growth_table([row for members in contests for row in members], variants)
    return f"{text}\n\n{growth}" if growth else text


def _growth_table(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """Exponents of time and memory in the tokens, from the three greatest lengths, where there are so many."""
    lines = [["shape", *(f"{name}: time, memory" for name in variants)]]
    for (dtype, num_heads, head_dim), members in _plain_shapes(rows):
        cells = []
        for name in variants:
            line = [row for row in members if row.variant == name and row.seconds]
            slopes = [exponent([(row.workload["length"], value(row)) for row in line]) for value in QUANTITIES.values()]
            enough = len(line) > 2 and None not in slopes
            cells.append(", ".join(f"{slope:.2f}" for slope in slopes) if enough else "")
        if any(cells):
            lines.append([f"{dtype}, {num_heads}x{head_dim}", *cells])
    explained = "Exponents of the number of tokens, fitted to the three greatest lengths"
    return f"{explained}\n\n{_markdown(lines)}" if len(lines) > 1 else ""


def _step_tables(contests: Sequence[Sequence[Row]]) -> str:
    """What every step of the ladder adds to the one before, in time, paired by rounds, and in peak memory."""
    times = [["contest", BASELINE, *(name for name, _, _ in ADDITIONS)]]
    memory = [list(times[0])]
    for members in contests:
        by_variant = {row.variant: row for row in members if row.seconds}
        base = by_variant.get(BASELINE)
        scale = members[0].workload["layers"] / members[0].workload["all_layers"]
        first = [row.time_text for row in members if row.variant == BASELINE]
        time_cells, memory_cells = first or [""], [base.memory_text if base else ""]
        for _, more, less in ADDITIONS:
            pair = by_variant.get(more), by_variant.get(less)
            if base is None or None in pair:
                missing = next((row for row in members if row.variant == more and not row.seconds), None)
                time_cells.append(missing.time_text if missing else "")
                memory_cells.append(missing.memory_text if missing else "")
                continue
            differences = [a - b for a, b in zip(pair[0].seconds, pair[1].seconds, strict=True)]
            added = statistics.median(differences)
            time_cells.append(f"{added * 1e3:+.1f} ({100 * added / base.median * scale:+.1f}%)")
            added = pair[0].peak_bytes - pair[1].peak_bytes
            whole = base.before_bytes + base.peak_bytes
            memory_cells.append(f"{added / 2**20:+.1f} ({100 * added / whole:+.1f}%)")
        times.append([members[0].contest, *time_cells])
        memory.append([members[0].contest, *memory_cells])
    return (
        f"Time, ms, forward and backward; what is added, and its share of the {BASELINE} step\n\n{_markdown(times)}\n\n"
        "Peak memory over what is in use before (weights and all), MiB; what is added, and its share of the whole peak "
        f"\n\n{_markdown(memory)}"
    )


def _teacher_tables(contests: Sequence[Sequence[Row]]) -> str:
    """The teacher's forward pass."""
    return (
        "Time, ms, of one joint input; sdpa-half supervises the block at half depth, above which none runs\n\n"
        + _compared_tables(contests, TEACHER_VARIANTS)
    )


def _preference_tables(contests: Sequence[Sequence[Row]]) -> str:
    """A step of ours beside TRL's."""
    return (
        "Time, ms, of loss and gradients over all pairs: TRL's RewardTrainer; Bradley-Terry in two rows a pair, and "
        "with each prompt once; and that with interaction distillation, its teacher cached or running\n\n"
        + _compared_tables(contests, PREFERENCE_VARIANTS)
    )


def _compared_tables(contests: Sequence[Sequence[Row]], order: Sequence[str]) -> str:
    """Times, each with how many of it the first variant's takes, and peak memory."""
    named = {row.variant for members in contests for row in members}
    variants = [name for name in order if name in named]
    baseline = order[0]
    compared = [name for name in variants if name != baseline]
    times = [["contest", *variants, *(f"{baseline} / {name}" for name in compared)]]
    memory = [["contest", *variants]]
    for members in contests:
        by_variant = {row.variant: row for row in members}
        medians = {name: row.median for name, row in by_variant.items()}
        base = medians.get(baseline)
        ratios = [f"{base / medians[name]:.2f}" if base and medians.get(name) else "" for name in compared]
        own = [by_variant[name].time_text if name in by_variant else "" for name in variants]
        times.append([members[0].contest, *own, *ratios])
        own = [by_variant[name].memory_text if name in by_variant else "" for name in variants]
        memory.append([members[0].contest, *own])
    return f"{_markdown(times)}\n\nPeak memory over the weights and inputs, MiB\n\n{_markdown(memory)}"


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of a line through (tokens, value) on log axes at the three largest numbers of tokens."""
    largest = sorted(points)[-3:]
    if len(largest) < 2 or min(value for _, value in largest) <= 0:
        return None
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in largest), strict=True)).slope


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
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


def _plain_shapes(rows: Sequence[Row]) -> list[tuple[tuple[str, int, int], list[Row]]]:
    """Rows of loss and gradients without options, by (dtype, num_heads, head_dim)."""
    options = ("passes", "num_kv_heads", "teacher", "units", "normalization")
    plain = ("forward_backward", None, "packed", "tokens", "block")
    own = [row for row in rows if row.suite == "op" and tuple(row.workload[name] for name in options) == plain]
    return _grouped(own, lambda row: tuple(row.workload[name] for name in ("dtype", "num_heads", "head_dim")))


def plot(rows: Sequence[Row], quantity: str, path: Path, title: str) -> None:
    """Time or memory of loss and gradients against the pair's tokens, a panel for each dtype and shape, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _plain_shapes(rows)
    columns = max(1, len(panels))
    figure, axes = pyplot.subplots(
        1, columns, figsize=(4.6 * columns, 4.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, ((dtype, num_heads, head_dim), members) in zip(axes[0], panels, strict=False):
        for variant, line in _grouped(members, lambda row: row.variant):
            line = sorted(line, key=lambda row: row.workload["length"])
            color = f"C{VARIANTS.index(variant)}"
            points = [(2 * row.workload["length"], QUANTITIES[quantity](row)) for row in line if row.seconds]
            if not points:
                continue
            slope = exponent(points)
            label = variant if slope is None else f"{variant} ~ N^{slope:.1f}"
            axis.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
            foretold = [(2 * row.workload["length"], row.needed_bytes / 2**20) for row in line if row.needed_bytes]
            if quantity == "memory" and foretold:
                axis.plot(*zip(*foretold, strict=True), "o--", color=color, fillstyle="none")
            roof = [(2 * row.workload["length"], row.roof_seconds * 1e3) for row in line if row.roof_seconds]
            if quantity == "time" and variant in FUSED.values() and roof:
                axis.plot(*zip(*roof, strict=True), ":", color=color, label=f"roof of {variant}")
        axis.set_title(f"{dtype}, {num_heads} heads of {head_dim}", fontsize=10)
        axis.set_xlabel("tokens of the pair")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("time, ms" if quantity == "time" else "peak memory over the inputs, MiB")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def read(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The machine and the rows of a saved run, or of a report. Raises ValueError for any other file."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        machine = saved["machine"] if "machine" in saved else saved["machine_info"]["idrm"]
        return machine, [Row(**row) for row in saved["rows"]]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a file that `pytest benchmarks` saved") from error


def describe_machine(machine: dict[str, str], device: str) -> str:
    """One line: the device and the versions that matter on it."""
    names = ["python", "torch", "triton", "transformers", *(["CUDA"] if device == "cuda" else ["cpu_instructions"])]
    return "; ".join([machine[device], ", ".join(f"{name} {machine[name]}" for name in names if name in machine)])


def write(runs: Sequence[tuple[dict[str, str], list[Row]]], results: Path) -> list[Path]:
    """Writes every device's folder, with what it holds of the same machine and versions already; the folders.

    Raises ValueError for runs on different machines or versions.
    """
    machine = runs[0][0]
    folders = []
    measured = [row for _, rows in runs for row in rows]
    for device, rows in _grouped(measured, lambda row: row.workload["device"]):
        described = describe_machine(machine, device)
        for other, _ in runs:
            if device in other and describe_machine(other, device) != described:
                raise ValueError(
                    f"runs on different machines or versions: {described}, {describe_machine(other, device)}"
                )
        folder = results / re.sub(r"[^a-z0-9]+", "-", machine[device].lower()).strip("-")
        if (folder / "rows.json").exists():
            earlier, earlier_rows = read(folder / "rows.json")
            if describe_machine(earlier, device) == described:
                rows = earlier_rows + rows
        _write_device(machine, described, list({(row.contest, row.variant): row for row in rows}.values()), folder)
        folders.append(folder)
    return folders


def _write_device(machine: dict[str, str], described: str, rows: Sequence[Row], folder: Path) -> None:
    commits = _grouped(rows, lambda row: (row.date, row.commit))
    title = f"{described}; " + ", ".join(f"{len(own)} rows on {date} at {commit}" for (date, commit), own in commits)
    content = {"machine": machine, "rows": [row.as_dict() for row in rows]}
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "report.md": lambda path: path.write_text(f"{title}\n\n{tables(rows)}\n", encoding="utf-8"),
        "rows.json": lambda path: path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"),
    }
    if _plain_shapes(rows):
        files |= {
            "memory.png": lambda path: plot(rows, "memory", path, title),
            "time.png": lambda path: plot(rows, "time", path, title),
        }
    for name, produce in files.items():
        temporary = folder / f".{name}.tmp{Path(name).suffix}"
        try:
            produce(temporary)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)


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
