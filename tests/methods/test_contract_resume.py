"""What every optimizer promises of its state: a resumed run is the run; a state that does not fit is refused whole."""

from __future__ import annotations

import copy
import io
import logging
import pickle

import pytest
import torch

from tests.methods.toy import batches, build, every_case, loss_of, toy, train, weights


@every_case
def test_resume_is_bit_exact(case: str) -> None:
    data = batches(23)
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, data[:13])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, data[13:])

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = toy(seed=5)
    resumed.load_state_dict(saved["model"])
    again = build(case, resumed)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, data[13:])
    assert torch.equal(weights(model), weights(resumed))


@every_case
def test_loading_does_not_change_its_argument(case: str) -> None:
    model = toy()
    optimizer = build(case, model)
    train(model, optimizer, batches(3))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    assert identical(saved, before)


def identical(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(identical(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def test_another_optimizers_checkpoint_is_refused() -> None:
    model = toy()
    mkor, lamb, eva = (build(case, model) for case in ("mkor", "lamb", "eva"))
    over_adamw, dense = build("mkor+adamw", model), build("mkor-dense", model)
    plain = torch.optim.AdamW(model.parameters()).state_dict()
    for optimizer, saved, message in (
        (mkor, lamb.state_dict(), "written with optimizer 'lamb'"),
        (lamb, mkor.state_dict(), "written with optimizer 'mkor'"),
        (mkor, eva.state_dict(), "written with optimizer 'eva'"),
        (mkor, over_adamw.state_dict(), "base optimizer 'AdamW'"),
        (mkor, plain, "no state of 'mkor'"),
        (mkor, dense.state_dict(), "this run needs"),
        (mkor, build("mkor", model, exclude=["hidden"]).state_dict(), "missing \\['hidden'\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)


@pytest.mark.parametrize("spoiled", ["ours", "base"])
def test_a_refused_state_changes_nothing(spoiled: str) -> None:
    model = toy()
    source, target = build("mkor", model), build("mkor", model)
    train(model, source, batches(3))
    saved = source.state_dict()
    if spoiled == "ours":
        saved["second_order"] = saved["second_order"] | {"optimizer": "eva"}
    else:
        saved["param_groups"] = saved["param_groups"][:1]
    with pytest.raises(ValueError):
        target.load_state_dict(saved)
    assert target.steps == 0 and not target.state
    assert all(not f["columns"].any() for state in target.stages.states.values() for f in state.values())


def test_changed_settings_on_resume_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    with caplog.at_level(logging.WARNING):
        build("mkor", model, update_period=5).load_state_dict(build("mkor", model).state_dict())
    assert caplog.text.count("changed settings") == 1 and "update_period" in caplog.text


def test_a_setting_that_a_checkpoint_does_not_know_yet_had_its_default(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    saved = build("mkor", model).state_dict()
    for younger in ("queries_and_keys", "exponent", "gate", "apply_to", "kv_target"):
        del saved["second_order"]["config"][younger]
    with caplog.at_level(logging.WARNING):
        build("mkor", model).load_state_dict(saved)
        assert "changed settings" not in caplog.text
        build("mkor", model, kv_target=0.5).load_state_dict(saved)
    assert "{'kv_target': (1.0, 0.5)}" in caplog.text


def test_optimizers_are_not_copied_and_models_are() -> None:
    model = toy()
    optimizer = build("mkor", model)
    for copier in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="save state_dict"):
            copier(optimizer)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(copied, batches(1)[0]).backward()  # its hooks are there and do nothing
        assert all(not t.any() for b in optimizer.stages.capture.buffers.values() for t in b)
        train(copied, build("mkor", copied), batches(2))
