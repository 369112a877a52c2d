"""What anybody puts into a row or a score can be written, and reads back as the same value in JSON's types."""

import json
import math
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from rewards.json_form import dumps, plain
from rewards.score import Score


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(["a", None], object), ["a", None]),
        (np.datetime64("2024-01-02T03:04:05", "ns"), "2024-01-02T03:04:05.000000000"),
        (torch.tensor([1.5, math.nan]), [1.5, None]),
        (pd.Timestamp("2024-01-02"), "2024-01-02T00:00:00"),
        (pd.NA, None),
        (pd.NaT, None),
        (pd.Series([1, 2]), [1, 2]),
        (datetime(2024, 1, 2, tzinfo=UTC), "2024-01-02T00:00:00+00:00"),
        (date(2024, 1, 2), "2024-01-02"),
        (b"text", "text"),
        (b"\xff\x00", "/wA="),
        (Decimal("1.10"), "1.10"),
        (Path("a/b"), "a/b"),
        ({3, 1, 2}, [1, 2, 3]),
        ((1, "x"), [1, "x"]),
        ({1: "a", np.int64(2): "b"}, {"1": "a", "2": "b"}),
        (math.inf, None),
        ("a lone \ud800 surrogate", "a lone \ud800 surrogate"),
        ({"ü": "\udfff"}, {"ü": "\udfff"}),
        (Score(1.0, "wrong", {"n": np.int8(3)}), {"value": 1.0, "verdict": "wrong", "metrics": {"n": 3}, "detail": ""}),
        (2**70, 2**70),
        (0.1 + 0.2, 0.1 + 0.2),
    ],
)  # fmt: skip
def test_a_value_is_written_in_jsons_own_types(value, read):
    text = dumps({"value": value, "beside": "é"})
    assert json.loads(text.encode()) == {"value": read, "beside": "é"}
    assert json.loads(json.dumps(plain(value))) == read


def test_what_has_no_form_in_json_can_be_left_as_it_is():
    when = date(2024, 1, 2)
    assert plain({"a": np.array([1, 2]), "b": when}, other=lambda value: value) == {"a": [1, 2], "b": when}
