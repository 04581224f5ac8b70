"""What a reader must be warned of, as values; the sentences stand in `report/templates/words.yaml`."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Note(NamedTuple):
    """kind: of the sentence; values: what it tells."""

    kind: str
    values: Mapping[str, Any]
