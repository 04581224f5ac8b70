"""Hugging Face dataset ids as tables, with an error of one line, and within seconds, for what cannot be fetched."""

from functools import partial

from huggingface_hub import constants, get_session

from ssl_vit.data.folders import Tables, hf_datasets
from ssl_vit.errors import Failure, reason


def hub_answers() -> bool:
    """Whether the hub can be reached and works, within seconds: its own client, and `datasets`, retry for half a minute."""
    try:
        return bool(get_session().head(constants.ENDPOINT, timeout=3).status_code < 500)
    except Exception:  # whatever the HTTP library of this version of the hub's package raises
        return False


def hub_tables(source: str, fetch: bool = True) -> Tables:
    """The splits of `owner/name` or `owner/name:config`; without `fetch` none, it is only asked for. Failure for one that cannot be had."""
    datasets = hf_datasets()
    name, _, config = source.partition(":")
    try:
        if not constants.HF_HUB_OFFLINE and not hub_answers():
            raise ConnectionError(f"{constants.ENDPOINT} does not answer; set HF_HUB_OFFLINE=1 for a cached copy")
        loaded = (datasets.load_dataset if fetch else datasets.load_dataset_builder)(name, config or None)
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" * constants.HF_HUB_OFFLINE
        raise Failure(f"the dataset {name!r} cannot be fetched{offline}: {reason(error)}; give a local folder") from error
    return {str(split): partial(loaded.__getitem__, split) for split in (loaded if fetch else ())}
