"""One mistake is one problem, at its place."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from distnorm.errors import ConfigError, DistnormError
from tests.config.files import Place, load, problems

FIVE = """\
norm:
  type: 0
clip:
  max_nrom: 1e-3
train:
  steps: "20"
  optimizer: {name: adam}
  parallel: {tp: 3}
"""


def test_five_mistakes_are_five_problems_with_their_places(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, FIVE)
    assert str(caught.value).splitlines() == [
        f"{file}:2:9: norm.type: expected a number > 0 or inf, found 0",
        f"{file}:4:3: clip.max_nrom: unknown key; did you mean 'max_norm'?",
        f"{file}:6:10: train.steps: expected an integer > 0, found the string '20'; write the number 20",
        f"{file}:7:21: train.optimizer.name: expected one of 'adamw', 'sgd', found the string 'adam'; "
        "did you mean 'adamw'?",
        f"{file}:8:18: train.parallel.tp: expected model.heads to be a multiple of parallel.tp = 3, found 4",
    ]
    assert isinstance(caught.value, DistnormError)
    assert isinstance(caught.value, ValueError)
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        # Unknown keys: the nearest sibling, the same key elsewhere, or what there is.
        ("clip:\n  max_nrom: 1", (2, 3, "clip.max_nrom"), "unknown key; did you mean 'max_norm'?"),
        ("clip: {max-norm: 1}", (1, 8, "clip.max-norm"), "unknown key; did you mean 'max_norm'?"),
        ("clip: {Max_Norm: 1}", (1, 8, "clip.Max_Norm"), "unknown key; did you mean 'max_norm'?"),
        ("max_norm: 1", (1, 1, "max_norm"), "unknown key; did you mean 'clip.max_norm'?"),
        ("parallel: {tp: 2}", (1, 1, "parallel"), "unknown key; did you mean 'train.parallel'?"),
        ("train: {lr: 1}", (1, 9, "train.lr"), "unknown key; did you mean 'train.optimizer.lr'?"),
        ("xyzzy: 1", (1, 1, "xyzzy"), "unknown key; expected one of norm, clip, monitor, train"),
        (
            "monitor: {xyzzy: 1}",
            (1, 11, "monitor.xyzzy"),
            "unknown key; expected one of every, by, clip_rate",
        ),
        ("monitor: {alerts: {explodin: 9}}", (1, 20, "monitor.alerts.explodin"), "did you mean 'exploding'?"),
        (
            "monitor: {tensorboard: true}",
            (1, 11, "monitor.tensorboard"),
            "did you mean 'monitor.sinks.tensor",
        ),
        (
            "clip.max_norm: 1",
            (1, 1, "clip.max_norm"),
            "unknown key; a dotted key is not split, write clip: {max_norm: ...}",
        ),
        ('"clip ": {}', (1, 1, "clip "), "unknown key; did you mean 'clip'?"),
        # Types: nothing is converted.
        ("clip: {max_norm: '1'}", (1, 18, "clip.max_norm"), "found the string '1'; write the number 1"),
        (
            "clip: {max_norm: 1_000}",
            (1, 18, "clip.max_norm"),
            "found the string '1_000'; write the number 1000",
        ),
        ("clip: {max_norm: 12:30}", (1, 18, "clip.max_norm"), "found the string '12:30'"),
        ("clip: {max_norm: None}", (1, 18, "clip.max_norm"), "found the string 'None'; write null"),
        ("clip: {max_norm: Infinity}", (1, 18, "clip.max_norm"), "found the string 'Infinity'; write inf"),
        ("clip: {max_norm: true}", (1, 18, "clip.max_norm"), "found true"),
        ("clip: {max_norm: [1]}", (1, 18, "clip.max_norm"), "found a list"),
        ("clip: {max_norm: {a: 1}}", (1, 18, "clip.max_norm"), "found a mapping"),
        ("train: {steps: 4.0}", (1, 16, "train.steps"), "expected an integer > 0, found 4.0; write 4"),
        ("train: {steps: true}", (1, 16, "train.steps"), "expected an integer > 0, found true"),
        ("train: {steps: null}", (1, 16, "train.steps"), "expected an integer > 0, found null"),
        (
            "train: {model: {tie_embeddings: yes}}",
            (1, 33, "train.model.tie_embeddings"),
            "expected true or false, found the string 'yes'; write true",
        ),
        (
            "train: {model: {tie_embeddings: 1}}",
            (1, 33, "train.model.tie_embeddings"),
            "expected true or false, found 1",
        ),
        (
            "train: {output_dir: 010}",
            (1, 21, "train.output_dir"),
            "expected a string that is not empty, found 10; put it in quotes",
        ),
        ("train: {output_dir: ''}", (1, 21, "train.output_dir"), "expected a string that is not empty"),
        (
            "clip: 1",
            (1, 7, "clip"),
            "expected a mapping with the keys max_norm, nonfinite, apply, overlap, policy, groups, found 1",
        ),
        ("monitor: []", (1, 10, "monitor"), "expected a mapping with the keys every, by, clip_rate_window"),
        (
            "monitor: {by: modul}",
            (1, 15, "monitor.by"),
            "expected one of 'parameter', 'module', 'depth' or a list that is not empty, "
            "found the string 'modul'; did you mean 'module'?",
        ),
        ("monitor: {by: [a, 1]}", (1, 15, "monitor.by"), "each a string that is not empty, found a list"),
        ("monitor: {by: []}", (1, 15, "monitor.by"), "a list that is not empty, found an empty list"),
        ("monitor: {by: ['']}", (1, 15, "monitor.by"), "each a string that is not empty, found a list"),
        # Nothing after the colon is not null: that would turn clipping off unnoticed.
        ("clip:\n  max_norm:\n", (2, 12, "clip.max_norm"), "or null, found no value; write null"),
        ("clip:\n", (1, 6, "clip"), "found no value; write {} for an empty section"),
        # Ranges.
        ("norm: {type: 0}", (1, 14, "norm.type"), "expected a number > 0 or inf, found 0"),
        ("norm: {type: -2}", (1, 14, "norm.type"), "expected a number > 0 or inf, found -2"),
        ("norm: {type: .nan}", (1, 14, "norm.type"), "expected a number > 0 or inf, found nan"),
        ("norm: {type: -.inf}", (1, 14, "norm.type"), "expected a number > 0 or inf, found -inf"),
        ("norm: {type: null}", (1, 14, "norm.type"), "expected a number > 0 or inf, found null"),
        ("clip: {max_norm: -1}", (1, 18, "clip.max_norm"), "expected a number >= 0, inf or null, found -1"),
        (
            "clip: {max_norm: .nan}",
            (1, 18, "clip.max_norm"),
            "expected a number >= 0, inf or null, found nan",
        ),
        (
            "train: {optimizer: {lr: .inf}}",
            (1, 25, "train.optimizer.lr"),
            "expected a number >= 0, found inf",
        ),
        (
            "train: {optimizer: {lr: .nan}}",
            (1, 25, "train.optimizer.lr"),
            "expected a number >= 0, found nan",
        ),
        (
            "monitor: {alerts: {drop: 2}}",
            (1, 26, "monitor.alerts.drop"),
            "expected a number > 0 and < 1 or null, found 2",
        ),
        (
            "monitor: {sinks: {prometheus: 70000}}",
            (1, 31, "monitor.sinks.prometheus.port"),
            "expected an integer >= 1 and <= 65535, found 70000",
        ),
        (
            "monitor: {sinks: {prometheus: {prt: 1}}}",
            (1, 32, "monitor.sinks.prometheus.prt"),
            "unknown key; did you mean 'port'?",
        ),
        (
            "monitor: {sinks: {prometheus: true}}",
            (1, 31, "monitor.sinks.prometheus"),
            "expected an integer, a mapping with the keys port, host or null, found true",
        ),
        (
            "monitor: {alerts: {notify: {webhook: 'file:///etc/passwd'}}}",
            (1, 38, "monitor.alerts.notify.webhook"),
            "expected a string such as https://host/path or $ENVIRONMENT_VARIABLE or null, found the string",
        ),
        (
            "monitor: {alerts: {notify: {every: 1}}}",
            (1, 28, "monitor.alerts.notify.command"),
            "expected command, webhook or both, found neither",
        ),
        (
            "monitor: {alerts: {hysteresis: 0.5}}",
            (1, 32, "monitor.alerts.hysteresis"),
            "expected a number >= 1, found 0.5",
        ),
        ("train: {seed: -1}", (1, 15, "train.seed"), "expected an integer >= 0, found -1"),
        ("train: {parallel: {tp: 0}}", (1, 24, "train.parallel.tp"), "expected an integer > 0, found 0"),
        (
            "train: {steps: 2147483648}",
            (1, 16, "train.steps"),
            "expected an integer > 0 and <= 2147483647, found 2147483648",
        ),
        (
            "clip: {nonfinite: skp}",
            (1, 19, "clip.nonfinite"),
            "expected one of 'raise', 'raise_now', 'skip', 'zero', 'propagate', found the string 'skp'; "
            "did you mean 'skip'?",
        ),
        # Keys.
        ("1: 2", (1, 1, "1"), "expected a string as key, found 1"),
        ("clip: {true: 1}", (1, 8, "clip.true"), "expected a string as key, found true"),
        ("clip: {[a]: 1}", (1, 8, "clip"), "expected a string as key, found something else"),
        ("? {a: b}\n: 1", (1, 3, ""), "expected a string as key, found something else"),
        # What could run code, or grow without bound.
        (
            "clip: !!python/object/apply:os.system [exit]",
            (1, 7, "clip"),
            "the tag !!python/object/apply:os.system is not allowed; only plain data is read",
        ),
        ("norm: {type: !p 2}", (1, 14, "norm.type"), "the tag !p is not allowed; only plain data is read"),
        ("clip: !!set {a}", (1, 7, "clip"), "the tag !!set is not allowed; only plain data is read"),
        ("train: {steps: !!int x}", (1, 16, "train.steps"), "expected a value of type !!int, found 'x'"),
        ("a: &a {b: *a}\n", (1, 11, "a.b"), "aliases are not followed; write the value out"),
        ("<<: {clip: {}}", (1, 1, "<<"), "merge keys are not followed; write the keys out"),
        # The document as a whole.
        ("", (1, 1, ""), "expected a mapping with the keys norm, clip, monitor, train, found no value"),
        ("# only a comment\n", (1, 1, ""), "found no value"),
        ("---\n", (2, 1, ""), "found no value"),
        ("null", (1, 1, ""), "found null"),
        ("- norm", (1, 1, ""), "found a list"),
        ("norm", (1, 1, ""), "found the string 'norm'"),
    ],
)
def test_one_mistake_is_one_problem_at_its_place(file: Path, text: str, place: Place, message: str) -> None:
    found = problems(file, text)
    # An unknown key that holds the mistake is a second one.
    problem = next(problem for problem in found if message in problem.message)
    assert (problem.line, problem.column, problem.path) == place
    assert problem.file == str(file)
    assert len(found) == (2 if text.startswith("a: &a") else 1)
