"""The inspection of a teacher before it is used: its maps over real pairs, measured block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from rich.console import Console
from rich.progress import track

from idrm.capture.layers import resolve_layers
from idrm.errors import InputError
from idrm.inspection.findings import (
    DEFAULT_MAX_PAIRS,
    HeatMap,
    Inspection,
    NliAccuracy,
    PairCounts,
    TeacherFindings,
)
from idrm.inspection.heat_map import Panel, draw_heat_map
from idrm.inspection.measures import BlockMeasures, PairMeasures
from idrm.inspection.reading import ReadPair, TeacherReader
from idrm.inspection.report import print_table, write_files
from idrm.run_folder import require_writable

Accuracy: TypeAlias = Mapping[str, Any] | Callable[[], Mapping[str, Any] | None] | None


def inspect_teacher(
    teacher_name_or_path: str,
    records: Sequence[Mapping[str, Any]],
    *,
    output_dir: str | Path,
    accuracy: Accuracy = None,
    compare_with: Mapping[str, Accuracy] | None = None,
    max_pairs: int = DEFAULT_MAX_PAIRS,
    teacher_max_length: int | None = None,
    layers: Iterable[int] | None = None,
    interaction_rows: Literal["all", "response"] = "all",
    heat_map_pair: int = 0,
    heat_map_layer: int | None = None,
    heat_map_normalization: Literal["block", "joint"] = "block",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Inspection:
    """Measures the attention maps of a teacher, block by block, prints a table and writes check.json, .md and .png.

    Pairs are read jointly as in training, one at a time. Of each block no more than one head-averaged map of one pair
    is held. What is measured is defined in ``idrm.inspection.measures``; how to read it is in docs/teachers.md.

    Args:
        teacher_name_or_path: hub name or folder of an encoder that ``Teacher.load`` accepts.
        records: pairs as ``load_preferences`` gives them (a Dataset or a list): chosen and rejected messages,
            conversational, margin.
        output_dir: folder of the three files, made where it is missing; files of an earlier inspection are replaced.
        accuracy: of this teacher on NLI, {"accuracy": share, "examples": count, "per_label": {label: the same two}};
            None where there is none, for want of an NLI head or of data. Or a function that measures it, which is
            called once nothing is left to refuse.
        compare_with: other teachers to put beside it, each with its own accuracy or None; over the same pairs.
        max_pairs: at most so many pairs are measured, taken at even distances from all records.
        teacher_max_length: longest joint input in tokens; None as in training: the teacher's limit, or 512.
        layers: blocks to look at, negative ones from the end; None for every one that can be supervised.
        interaction_rows: "all", or "response" for training with the same flag: no row of a prompt is looked at.
        heat_map_pair: the record in the picture, counted from 0; it need not be among the measured ones.
        heat_map_layer: its block; None for the one with the most row-specific structure between the responses. Of
            another teacher the block at the same distance from the end is shown, else its own most row-specific one.
        heat_map_normalization: "block", or "joint" for what crosses.
        dtype: of the teacher; None keeps the checkpoint's.
        device: where the teacher runs.
        console: where the table goes; default: stdout.

    Returns:
        The findings, the teachers in the order given.

    Raises:
        InputError: no such record or layer, no pair to measure, a folder that cannot be written to, a teacher that
            cannot be loaded. Nothing is written then.
    """
    names = [teacher_name_or_path, *(compare_with or {})]
    if len(set(names)) < len(names):
        raise InputError(f"compare_with: {teacher_name_or_path!r} is the teacher itself; expected another one")
    if max_pairs < 1:
        raise InputError(f"max_pairs: expected at least 1, found {max_pairs}")
    if not 0 <= heat_map_pair < len(records):
        raise InputError(f"heat_map_pair {heat_map_pair}: expected one of the {len(records)} pairs, counted from 0")
    accuracies = [accuracy, *(compare_with or {}).values()]
    folder = Path(output_dir)
    require_writable("output_dir", folder)

    layers = None if layers is None else tuple(layers)
    readers = [
        TeacherReader(
            name, layers=layers, max_length=teacher_max_length, rows=interaction_rows, dtype=dtype, device=device
        )
        for name in names
    ]
    # Refused before the long part.
    if heat_map_layer is not None:
        (heat_map_layer,) = resolve_layers([heat_map_layer], readers[0].num_layers, "heat_map_layer")
        if heat_map_layer not in readers[0].layers:
            raise InputError(f"heat_map_layer {heat_map_layer}: expected one of {list(readers[0].layers)}")
    shown_pairs = [_pair_with_units(reader, records[heat_map_pair], heat_map_pair) for reader in readers]

    accuracies = [value() if callable(value) else value for value in accuracies]
    accuracies = [value and NliAccuracy.of(value) for value in accuracies]
    measured = _measure(readers, records, max_pairs)
    teachers = [
        TeacherFindings(
            reader.name, reader.num_layers, reader.max_length, reader.is_nli_classifier, value, counts, blocks
        )
        for reader, value, (counts, blocks) in zip(readers, accuracies, measured, strict=True)
    ]
    shown_layers = _shown_layers(teachers, heat_map_layer)
    panels = [
        _panel(reader, teacher, pair, layer, heat_map_pair, heat_map_normalization)
        for reader, teacher, pair, layer in zip(readers, teachers, shown_pairs, shown_layers, strict=True)
    ]
    inspection = Inspection(teachers, interaction_rows, HeatMap(heat_map_pair, heat_map_normalization, shown_layers))
    files = write_files(folder, inspection, draw_heat_map(panels, heat_map_normalization))
    console = console or Console()
    print_table(inspection, console)
    console.print(f"these numbers: {files[0]}, {files[1]}; picture: {files[2]}", soft_wrap=True, highlight=False)
    return inspection


class _Tally:
    """What one teacher adds up over the pairs."""

    def __init__(self, reader: TeacherReader):
        self.of_layer: dict[int, list[PairMeasures]] = {layer: [] for layer in reader.layers}
        self.dropped: Counter[str] = Counter()
        self.measured = self.cut = self.tokens = self.tokens_in_no_unit = 0

    def count(self, encoded: Mapping[str, Any]) -> bool:
        """Counts a pair, and says whether it can be measured."""
        reason = _drop_reason(encoded)
        if reason:
            self.dropped[reason] += 1
            return False
        self.measured += 1
        self.cut += encoded["cut_teacher"]
        self.tokens += encoded["teacher_content_tokens"]
        self.tokens_in_no_unit += encoded["dropped_teacher_tokens"]
        return True

    def counts(self, given: int, chosen: int) -> PairCounts:
        return PairCounts(
            given=given,
            chosen=chosen,
            measured=self.measured,
            cut=self.cut,
            tokens=self.tokens,
            tokens_in_no_unit=self.tokens_in_no_unit,
            dropped=dict(sorted(self.dropped.items())),
        )


def _measure(
    readers: Sequence[TeacherReader], records: Sequence[Mapping[str, Any]], max_pairs: int
) -> list[tuple[PairCounts, dict[int, BlockMeasures]]]:
    """For each teacher what became of the pairs, and the measures of its blocks over them."""
    number = min(max_pairs, len(records))
    chosen = [position * len(records) // number for position in range(number)]
    tallies = [_Tally(reader) for reader in readers]
    for index in track(chosen, "Reading pairs", console=Console(stderr=True), transient=True):
        read: list[ReadPair | None] = []
        for reader, tally in zip(readers, tallies, strict=True):
            encoded = reader.encode(records[index])
            read.append(reader.read(encoded) if tally.count(encoded) else None)
        _measure_pair(readers, read, tallies)
    results = []
    for reader, tally in zip(readers, tallies, strict=True):
        counts = tally.counts(len(records), number)
        if not counts.measured:
            raise InputError(f"teacher {reader.name!r}: no pair can be measured ({counts.summary()})")
        results.append((counts, {layer: BlockMeasures.summary(pairs) for layer, pairs in tally.of_layer.items()}))
    return results


def _measure_pair(readers: Sequence[TeacherReader], read: Sequence[ReadPair | None], tallies: Sequence[_Tally]) -> None:
    """Adds one pair to the tallies, block after block, so that few maps are held at a time."""
    depths = sorted({layer - reader.num_layers for reader in readers for layer in reader.layers})
    for from_end in depths:
        first = None
        for index, (reader, pair, tally) in enumerate(zip(readers, read, tallies, strict=True)):
            layer = reader.num_layers + from_end
            if pair is None or layer not in reader.layers:
                continue
            block = reader.layers.index(layer)
            own = pair.map(block, "block")
            comparable = first is not None and pair.has_units_of(read[0])
            measures = PairMeasures.of(pair.map(block, "joint"), own, pair.units, first if comparable else None)
            tally.of_layer[layer].append(measures)
            if index == 0:
                first = own


def _shown_layers(teachers: Sequence[TeacherFindings], asked: int | None) -> list[int]:
    """The layer of every teacher in the picture; ``asked`` is one of the first's."""
    first, *others = teachers
    shown = first.most_row_specific_layer if asked is None else asked
    same_depth = [other.num_layers + first.from_end(shown) for other in others]
    return [
        shown,
        *(
            layer if layer in other.blocks else other.most_row_specific_layer
            for other, layer in zip(others, same_depth, strict=True)
        ),
    ]


def _panel(
    reader: TeacherReader,
    teacher: TeacherFindings,
    encoded: Mapping[str, Any],
    layer: int,
    pair: int,
    normalization: Literal["block", "joint"],
) -> Panel:
    read = reader.read(encoded)
    title = f"{teacher.name}\npair {pair}, block {teacher.label(layer)}: rows attend to columns"
    return Panel(title, read.map(reader.layers.index(layer), normalization), read.tokens, read.units)


def _drop_reason(encoded: Mapping[str, Any]) -> str:
    """Why a pair has no maps; "" where it has."""
    if encoded["refusal"]:
        return "refused_by_chat_template"
    if encoded["identical"]:
        return "identical"
    if encoded["unaligned"]:
        return "unaligned"
    return "" if sum(encoded["num_units"]) else "without_units"


def _pair_with_units(reader: TeacherReader, record: Mapping[str, Any], index: int) -> dict[str, Any]:
    encoded = reader.encode(record)
    reason = _drop_reason(encoded)
    if reason:
        raise InputError(f"heat_map_pair {index}: this pair has no map ({reason}); name another one")
    return encoded
