"""Reads that take turns with decode steps."""

import numpy as np
import pytest

from exporter.config import ModelConfig
from exporter.errors import UserError
from profiles.measure import Plan, measure
from profiles.reading import READ, Reading, beside, by_reads

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=2, kv_heads=(1,), head_dim=4, intermediate_size=8, max_positions=256
)


def test_a_read_is_of_the_weights_and_the_cache_in_use(factory, monkeypatch):
    subject, read = factory.subject(1, weight_bytes=1_000_000), []
    monkeypatch.setattr(np, "array_split", lambda array, parts: [read.append(array.nbytes) or array[:0]] * parts)
    with Reading(CONFIG, subject, 2, 8, 2) as session:
        session.prefill([np.zeros(3, np.int64), np.zeros(3, np.int64)])
        session.decode(np.zeros(2, np.int64))
        assert session.lengths.tolist() == [4, 4]
        session.rewind(3)
        session.decode(np.zeros(2, np.int64))
    expected = (subject.weight_bytes + 2 * 3 * subject.kv_bytes_per_token) // 8 * 8
    assert read == [expected, expected]


def test_it_has_turns_like_any_other_and_is_the_floor_of_its_place(factory):
    subject = factory.subject(1)
    plan = Plan((4, 8), kinds=("decode",), samples=4, burst=1, settle=0, warmup=0)
    cells = measure([beside(subject, CONFIG)], plan)
    assert [(cell.subject.pattern, cell.context, cell.backend, len(cell.samples)) for cell in cells] == [
        (READ, 4, READ, 4),
        (READ, 8, READ, 4),
    ]
    steps = [factory.cell(subject, context=context, floor=0.5) for context in (4, 8)]
    first = factory.cell(subject, kind="ttft", context=16)
    found = by_reads([*steps, first, *cells])
    assert [cell.floor for cell in found] == [*(pytest.approx(np.median(cell.samples)) for cell in cells), first.floor]
    assert by_reads([*steps, first]) == [*steps, first]


def test_a_step_that_no_read_took_turns_with_has_no_floor(factory):
    subject = factory.subject(1)
    reads = factory.cell(factory.subject(1, pattern=READ), context=4, backend=READ)
    for apart in (factory.cell(subject, context=8), factory.cell(subject, context=4, cohort=1)):
        with pytest.raises(UserError, match=f"no read took turns with {subject.pattern} at {apart.context} tokens"):
            by_reads([factory.cell(subject, context=4), apart, reads])
