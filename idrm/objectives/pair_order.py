"""An order of the two sequences of a pair, drawn once for all epochs, processes and runs of a seed."""

from array import array
from hashlib import sha256
from typing import Any

from datasets import Dataset, Value

ORDER_COLUMN = "chosen_is_first"


def draw_pair_order(pairs: Dataset, seed: int) -> Dataset:
    """Encoded pairs with a column more, `chosen_is_first` (bool), a coin thrown by a pair's tokens and the seed."""

    def chosen_is_first(pair: dict[str, Any]) -> bool:
        digest = sha256(f"pair order {seed}".encode())
        # In an order that does not depend on which one is chosen: the label must not decide the coin.
        sequences = sorted((pair["chosen_input_ids"], pair["rejected_input_ids"]))
        for ids in sequences:
            digest.update(array("q", [len(ids), *ids]).tobytes())
        first_in_order_is_first = digest.digest()[0] % 2 == 1
        return first_in_order_is_first == (sequences[0] == pair["chosen_input_ids"])

    columns = pairs.select_columns(["chosen_input_ids", "rejected_input_ids"])
    return pairs.add_column(ORDER_COLUMN, [chosen_is_first(pair) for pair in columns], feature=Value("bool"))
