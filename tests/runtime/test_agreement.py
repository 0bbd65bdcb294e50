"""What processes tell each other: here the answers of one are made up (see also test_processes)."""

import pytest

from dinosae_jax.runtime import agreement


def test_one_process_answers_itself():
    assert agreement.gather({"a": 1}) == [{"a": 1}]
    assert agreement.from_first(lambda: 3) == 3
    agreement.require_equal("config", {"a": 1})


def test_what_differs_is_named(monkeypatch):
    theirs = {"config": {"steps": 2, "seed": 0}, "code": "x"}
    monkeypatch.setattr(agreement, "gather", lambda ours: [ours, ours, theirs])
    with pytest.raises(ValueError) as caught:
        agreement.require_equal("config", {"config": {"steps": 1, "seed": 0}, "code": "x"})
    assert str(caught.value) == (
        "all processes must have the same config; got config.steps: 1 on process 0, 2 on process "
        "2; start them all with the same command, code and files"
    )


@pytest.mark.parametrize(
    ("answer", "kind"), [({"system": "stale"}, OSError), ({"other": "wrong"}, ValueError)]
)
def test_an_error_of_the_first_is_one_of_all(monkeypatch, answer, kind):
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
    monkeypatch.setattr(agreement.jax, "process_index", lambda: 1)
    monkeypatch.setattr(agreement, "gather", lambda ours: [answer, ours])
    with pytest.raises(kind, match=next(iter(answer.values()))):
        agreement.from_first(lambda: pytest.fail("only the first process is asked"))
