"""Hugging Face dataset ids as tables, with an error of one line, and within seconds, for what cannot be fetched."""

from functools import partial

from huggingface_hub import constants, get_session

from ssl_vit.data.folders import Tables, hf_datasets
from ssl_vit.errors import Failure, reason


def hub_answers() -> bool:
    """Whether the hub can be reached, within seconds: its own client, and `datasets`, retry for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # whatever the HTTP library of this version of the hub's package raises
        return False
    return True


def hub_tables(source: str) -> Tables:
    """The splits of `owner/name` or `owner/name:config`; Failure for one that cannot be fetched."""
    datasets = hf_datasets()
    name, _, config = source.partition(":")
    advice = f"no folder {source!r} is here either; give a local folder"
    if not constants.HF_HUB_OFFLINE and not hub_answers():
        raise Failure(
            f"the dataset {name!r} cannot be fetched: {constants.ENDPOINT} does not answer; {advice} or set HF_HUB_OFFLINE=1 for a "
            "cached copy"
        )
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise Failure(f"the dataset {name!r} cannot be fetched{offline}: {reason(error)}; {advice}") from error
    return {str(split): partial(loaded.__getitem__, split) for split in loaded}
