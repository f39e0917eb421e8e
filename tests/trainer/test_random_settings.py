"""Random settings, good and bad: each is taken as it is, or refused in one line of key, value and what is allowed.

What is allowed is said here anew, in `RIGHT`, and not read from the code.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hf_soo import build_optimizer
from hf_soo.integrations.arguments import SecondOrderTrainingArguments
from hf_soo.lm.data import TextArguments
from hf_soo.lm.model import LanguageModelArguments
from hf_soo.registry import METHODS
from hf_soo.runs.arguments import parse
from hf_soo.runs.run_arguments import RunArguments, RunTrainingArguments

Rule = Callable[[Any], bool]


def number(value: Any) -> bool:
    return type(value) in {int, float} and -1.7976931348623157e308 <= value <= 1.7976931348623157e308


def whole(low: int, high: int = 2**63) -> Rule:
    return lambda value: type(value) is int and low <= value < high


def between(low: float, high: float, *, low_in: bool = True, high_in: bool = False) -> Rule:
    def rule(value: Any) -> bool:
        return number(value) and (low < value < high or (low_in and value == low) or (high_in and value == high))

    return rule


def one_of(*values: Any) -> Rule:
    return lambda value: any(type(value) is type(each) and value == each for each in values)


def none_or(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def pair(first: Rule, second: Rule) -> Rule:
    return lambda value: type(value) in {list, tuple} and len(value) == 2 and first(value[0]) and second(value[1])


def texts(value: Any) -> bool:
    return type(value) in {list, tuple} and all(isinstance(each, str) for each in value)


def text(value: Any) -> bool:
    return isinstance(value, str)


INF = float("inf")
not_negative, positive, share = between(0, INF), between(0, INF, low_in=False), between(0, 1)
open_share, weight = between(0, 1, low_in=False), between(0, 1, low_in=False, high_in=True)
portion, truth = between(0, 1, high_in=True), one_of(True, False)
RIGHT: dict[str, Rule] = {
    # of methods
    "update_period": whole(1), "warmup_updates": whole(0), "representation": one_of("lowrank", "dense"),
    "history": whole(1), "update_rule": one_of("blend", "exact", "paper"), "clip_value": positive,
    "kv_scale": one_of("unit", "sum", "mean"), "kv_target": positive, "rank": whole(1), "gate": truth,
    "queries_and_keys": one_of(True, False, "auto"),
    "sides": one_of("both", "input", "output", "none"), "stabilizer_threshold": none_or(between(1, INF)),
    "stabilizer_blend": none_or(share), "rescale": one_of("norm", "none", "kl_clip", "global"), "rate_decay": share,
    "rate_fraction": positive, "patience": whole(1), "min_steps": whole(0), "kv_new_weight": weight,
    "damping": positive, "factor_decay": share,
    "kl_clip": none_or(positive), "form": one_of("joint", "separable"), "exponent": none_or(positive),
    "damping_mode": one_of("relative", "absolute"), "inverse": one_of("cholesky", "eigen"),
    "inverse_period": whole(1), "input_blocks": whole(1), "row_filter": one_of("grad", "all"), "max_dim": whole(1),
    "grad_workers": none_or(whole(1)), "factor_start": lambda v: v in ("corrected", "identity") or positive(v),
    "fisher": one_of("empirical", "mc"), "loss_terms": none_or(whole(1)),
    "factor_scale": one_of("loss", "published"), "batch_size": none_or(whole(1)), "factor_lr": share,
    "riemannian_momentum": share, "schedule": one_of("period", "prototype"),
    "large_axes": one_of("block", "diagonal", "identity"), "vector_axes": one_of("diagonal", "dense"),
    "family": none_or(one_of("llama", "bert", "roformer")),
    "merge_kernels": truth, "state_dtype": one_of("float32", "bfloat16"),
    "grafting": one_of("sgd", "adam", "muon", "none"), "graft_decay": share, "epsilon": positive,
    "trace_scaling": truth, "apply_to": one_of("gradient", "momentum", "update", "numerator"),
    "moment_decay": share, "ties": not_negative,
    # of bases
    "lr": not_negative, "rest_lr": none_or(not_negative), "weight_decay": none_or(not_negative),
    "momentum": share, "dampening": portion, "alpha": share, "rho": share, "lr_decay": not_negative,
    "eps": not_negative, "rest_eps": not_negative, "betas": pair(share, share), "rest_betas": pair(share, share),
    "nesterov": truth, "amsgrad": truth, "maximize": truth, "centered": truth, "capturable": truth,
    "differentiable": truth, "always_adapt": truth, "foreach": none_or(truth), "fused": none_or(truth),
    "max_grad_norm": none_or(positive), "ns_steps": whole(1, 100),
    "ns_coefficients": one_of("jordan", "polar_express"),
    "ns_dtype": one_of("auto", "float32", "bfloat16", "float16"), "momentum_decay": not_negative,
    "decoupled_weight_decay": truth, "etas": pair(open_share, between(1, INF, low_in=False)),
    "step_sizes": pair(positive, positive), "include": none_or(texts), "exclude": none_or(texts),
    # of flags
    "task": none_or(text), "name": none_or(text), "results_dir": none_or(text), "target_eval_loss": none_or(positive),
    "restart": truth, "traceback": truth, "compare_with": none_or(text),
    "compare_learning_rate": none_or(not_negative), "compare_base_optim": none_or(text), "hidden_size": whole(1),
    "num_hidden_layers": whole(1), "num_attention_heads": none_or(whole(1)), "intermediate_size": none_or(whole(1)),
    "tie_word_embeddings": none_or(truth), "dropout": share, "attn_implementation": none_or(text), "source": text,
    "text_column": text, "max_bytes": whole(1), "tokenizer_name": none_or(text),
    "objective": one_of("causal", "masked"), "mask_prob": open_share, "window": whole(2),
    "held_out": one_of("choose", "claim"), "max_eval_samples": whole(1), "wiki_as_written": truth,
    # of the Trainer
    "learning_rate": not_negative, "adam_beta1": share, "adam_beta2": share, "adam_epsilon": not_negative,
    "num_train_epochs": positive, "max_steps": lambda value: one_of(-1)(value) or whole(1)(value),
    "warmup_steps": not_negative, "per_device_train_batch_size": whole(1), "per_device_eval_batch_size": whole(1),
    "gradient_accumulation_steps": whole(1), "logging_steps": positive, "save_steps": positive,
    "eval_steps": none_or(positive), "eval_delay": not_negative, "save_total_limit": none_or(whole(1)),
    "seed": whole(0, 2**32), "data_seed": none_or(whole(0)), "label_smoothing_factor": share,
    "dataloader_num_workers": whole(0), "bf16": truth, "do_train": truth, "prediction_loss_only": truth,
    "eval_strategy": one_of("no", "steps", "epoch"), "global_batch_size": none_or(whole(1)),
    "precondition_exclude": none_or(texts),
}  # fmt: skip
MKORS = ("mkor", "muon_mkor", "mkor_h")
OF_METHOD: dict[tuple[str, str], Rule] = {
    ("if_shampoo", "damping"): not_negative, ("shampoo", "factor_decay"): weight, ("eva_s", "exponent"): positive,
    **{(name, "factor_decay"): open_share for name in MKORS}, **{(name, "exponent"): weight for name in MKORS},
    **{(name, "rescale"): one_of("norm", "none") for name in MKORS},
    ("if_shampoo", "batch_size"): whole(1), ("rf_rmsprop", "batch_size"): whole(1),  # nobody fills it in there
    ("Trainer", "weight_decay"): not_negative,
    **{(name, "epsilon"): not_negative for name in ("kfac_expand", "kfac_reduce", "kaisa", "foof", "newton_muon")},
}  # fmt: skip


def right(key: str, value: Any, name: str = "") -> bool:
    return OF_METHOD.get((name, key), RIGHT.get(key, lambda value: True))(value)


ODD: list[Any] = [
    None, True, False, 0, 1, 2, 3, 7, -1, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-8, 1e308, 5e-324, 10**400, -(10**400),
    10**5000, 2**63, 2**31, INF, -INF, float("nan"), "", "1", "0.1", "nan", "none", "dense", "norm", "sum", "true",
    "größe", "名前", "a\nb", "\x00", "\ud800", "--restart", "(", [], (), [0.9], (0.9, 0.99), [0.9, True], (0.9, INF),
    (1.5, 0.5), [0.5, 1.2], [1, 2, 3], ["pooler", "--restart", "true"], [[1]], {}, {"a": {"b": 1}}, 1j, b"x", object,
    "x" * 3000, list(range(3000)),
]  # fmt: skip
fast = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MODEL = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
BASES = {
    "lamb": ("betas", "eps", "max_grad_norm", "always_adapt"),
    "adamw": ("betas", "eps", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
    "sgd": ("momentum", "dampening", "nesterov", "maximize", "foreach", "differentiable", "fused"),
    "rmsprop": ("alpha", "eps", "momentum", "centered", "foreach"),
    "muon": (
        "rest_lr", "momentum", "nesterov", "ns_steps", "ns_coefficients", "ns_dtype", "rest_betas", "rest_eps",
    ),
    "torch.optim:NAdam": ("betas", "eps", "momentum_decay", "decoupled_weight_decay", "foreach", "maximize"),
    "torch.optim:Rprop": ("etas", "step_sizes", "foreach"),
    "torch.optim:Adadelta": ("rho", "eps", "maximize"),
    "torch.optim:Adagrad": ("lr_decay", "eps"),
}  # fmt: skip
TOGETHER = (
    r"no effect|no layer selected|must be|is no multiple|needs|is less than|would never|change nothing|allows|whose|"
    r"requires|with |does not divide"
)


def fields_of(name: str) -> list[str]:
    config = METHODS[name].config
    return [*(field.name for field in dataclasses.fields(config)), "apply_to"] if config is not None else []


@st.composite
def asked(draw: st.DrawFn) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A method, what is set of it, and its base's arguments."""
    name = draw(st.sampled_from(sorted(METHODS)))
    base = draw(st.sampled_from(sorted(BASES))) if METHODS[name].config is not None else name
    of_method, of_base = [*fields_of(name), "lr", "weight_decay", "include", "exclude"], list(BASES[base])
    keys = draw(st.lists(st.sampled_from(of_method), max_size=2, unique=True))
    own = {key: draw(st.sampled_from(ODD) | st.floats() | st.integers(-2, 5)) for key in keys}
    of_base = [key for key in of_base if key not in own]
    inner = {
        key: draw(st.sampled_from(ODD) | st.tuples(st.floats(-1, 2), st.floats(-1, 2)))
        for key in draw(st.lists(st.sampled_from(of_base), max_size=1))
    }
    if METHODS[name].config is None:
        own = {key: value for key, value in own.items() if key in {"lr", "weight_decay"}}
        return name, own | inner, {}
    return name, own | {"base": base}, inner


def says(message: str, key: str, value: Any) -> bool:
    """Whether it names key and value, however long the value is."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return key in message and f"{value.bit_length()} bits" in message
    return key in message and repr(value)[:12] in message


def check_refusal(error: Exception, given: Mapping[str, Any], name: str = "") -> None:
    """One line; of a value that is wrong by itself with what is allowed, else of two that contradict each other."""
    message = str(error)
    wrong = {key: value for key, value in given.items() if not right(key, value, name)}
    assert "\n" not in message and len(message) < 500, message
    if re.search(r" is not allowed; give | is a string; give | is no regular expression ", message):
        assert any(says(message, key, value) for key, value in wrong.items()), message
    else:
        assert any(key in message for key in given) and re.search(TOGETHER, message), (message, given)


def test_every_setting_of_a_method_has_a_rule() -> None:
    missing = {key for name in METHODS for key in fields_of(name) if key not in RIGHT}
    flags = {
        field.name for cls in (LanguageModelArguments, TextArguments, RunArguments) for field in dataclasses.fields(cls)
    }
    assert missing == set()
    assert {flag for flag in flags if flag not in RIGHT and not flag.endswith("_args")} == set()


@settings(fast, max_examples=1500)
@given(asked())
def test_build_optimizer(what: tuple[str, dict[str, Any], dict[str, Any]]) -> None:
    name, own, inner = what
    try:
        batch = {"batch_size": 4} if "batch_size" in fields_of(name) else {}
        optimizer = build_optimizer(name, MODEL, **{"lr": 1e-3, **batch, **own}, base_args=inner or None)
    except (ValueError, NotImplementedError) as error:
        check_refusal(error, own | inner, name)
        return
    optimizer.remove_hooks()
    for key, value in {**own, **inner}.items():
        assert right(key, value, name), f"{key}={value!r} was taken"
    for key, value in own.items():
        if key in optimizer.config:
            assert optimizer.config[key] == value


TRAINER = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "num_train_epochs", "max_steps",
    "warmup_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "logging_steps", "save_steps", "eval_steps", "eval_delay", "save_total_limit", "seed", "data_seed",
    "label_smoothing_factor", "dataloader_num_workers", "bf16", "do_train", "prediction_loss_only", "eval_strategy",
)  # fmt: skip


@settings(fast, max_examples=700)
@given(
    st.dictionaries(st.sampled_from(TRAINER), st.sampled_from(ODD) | st.floats(-1, 3) | st.integers(-2, 5), max_size=2)
)
def test_the_trainers_arguments(tmp_path: Path, given: dict[str, Any]) -> None:
    try:
        SecondOrderTrainingArguments(str(tmp_path), optim="mkor", use_cpu=True, **given)
    except ValueError as error:
        check_refusal(error, given, "Trainer")
        return
    for key, value in given.items():
        assert right(key, value, "Trainer"), f"{key}={value!r} was taken"


CLASSES = (LanguageModelArguments, TextArguments, RunArguments)
FLAGS = sorted({field.name for cls in CLASSES for field in dataclasses.fields(cls)})
WORDS = [
    "0", "1", "8", "64", "-1", "1.5", "0.1", "1e-3", "1e400", "nan", "inf", "-inf", "True", "false", "yes", "None", "",
    " ", "9" * 400, "9" * 5000, "1_0", "0x10", "١", "größe", "../../x", "a/b", ".", "..", "a\nb", "\ud800", "x" * 300,
    "causal", "choose", "--restart", "[1, 2]", '{"a": 1}', '{"a": 1, "a": 2}', "a=1,a=2", "a=1", "[" * 3000, "lamb",
]  # fmt: skip


def check_taken(parsed: tuple[Any, ...], given: Mapping[str, Any]) -> None:
    """Every value is right, and nothing else was set."""
    for each in parsed:
        for field in dataclasses.fields(each):
            value = getattr(each, field.name)
            assert field.name in given or value == field.default, f"{field.name}={value!r} was set by {given}"
            assert field.name not in RIGHT or RIGHT[field.name](value), f"{field.name}={value!r} was taken"
    name = parsed[-1].name if isinstance(parsed[-1], RunArguments) else None
    assert name is None or ("/" not in name and name not in {"", ".", ".."} and len(f"{name}.json".encode()) < 230)


def check_line(error: Exception, given: Mapping[str, Any]) -> None:
    message = " ".join(str(error).split())
    assert len(message) < 6000
    assert any(key in message for key in given) and re.search(
        r"; (give|use|escape|did you mean|--help|say|write)|is no even number|invalid|expected", message
    ), message


@settings(fast, max_examples=1000)
@given(st.dictionaries(st.sampled_from(FLAGS), st.sampled_from(WORDS), min_size=1, max_size=3))
def test_flags(given: dict[str, str]) -> None:
    try:
        parsed = parse(CLASSES, [f"--{key}={value}" for key, value in given.items()])
    except ValueError as error:
        check_line(error, given)
        return
    check_taken(parsed, given)


SNIPPETS = [
    *WORDS[:24], ".nan", ".inf", "~", "null", "no", "on", "'0.1'", '"1"', "[pooler, '--restart', 'true']",
    "[]", "[1]", "[true]", "[null]", "[[1]]", "[a, {b: 1}]", "{a: {b: 1}}", "{a: 1, a: 2}", "{1: 2}", "{a: 2024-01-01}",
    "2024-01-01",
    "2024-13-01", "!!python/name:os.system x", "!!binary eA==", "!!set {a}", "!!str 5", "!!int '5'", "!foo 1",
    "&x 1", "*x", "{<<: {a: 1}}", "1:30", "'größe'", '"\\ud800"', '"\\0"', "\t1", "- a", "{", "9" * 5000,
    "|\n  a", "? a", "'--restart'", "a: b",
]  # fmt: skip


@settings(fast, max_examples=1000)
@given(
    st.lists(
        st.tuples(st.sampled_from([*FLAGS, "hiden_size", "名前", "1", "<<", "for"]), st.sampled_from(SNIPPETS)),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_yaml(tmp_path: Path, given: list[tuple[str, str]]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in given), encoding="utf-8", errors="surrogatepass")
    try:
        parsed = parse(CLASSES, ["--config", str(file)])
    except ValueError as error:
        if str(file) in str(error):
            assert len(str(error)) < 6000 and len(str(error)) > len(str(file)) + 20
        else:
            check_line(error, dict(given))
        return
    assert len({key for key, _ in given}) == len(given)  # none stood twice
    check_taken(parsed, dict(given))


def test_brackets_without_end(tmp_path: Path) -> None:
    file = tmp_path / "deep.yaml"
    file.write_text("[" * 1100)
    with pytest.raises(ValueError, match=r"--config .*deep\.yaml: "):
        parse(CLASSES, ["--config", str(file)])


@pytest.mark.parametrize("value", [{"update_period": 3}, '{"update_period": 3}', "update_period=3"])
def test_a_mapping_is_written_in_three_ways(value: Any, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"optim: mkor\noptim_args: {value if isinstance(value, str) else json.dumps(value)}\n".replace("'", "")
    )
    (training,) = parse((RunTrainingArguments,), ["--config", str(file), "--output_dir", str(tmp_path)])
    assert training.parsed.optimizer is not None and training.parsed.optimizer.config.update_period == 3


def test_a_rate_that_is_a_tensor_is_taken_for_its_value() -> None:
    build_optimizer("sgd", MODEL, lr=torch.tensor(0.1)).remove_hooks()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SGD: lr=nan is not allowed"):
        build_optimizer("sgd", MODEL, lr=torch.tensor(float("nan")))  # type: ignore[arg-type]
