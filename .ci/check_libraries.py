#!/usr/bin/env python3
# SPDX-FileCopyrightText: 2026 the run_utils authors
# SPDX-License-Identifier: MIT
"""Check the conversion against the real libraries; one that is missing is skipped."""

from __future__ import annotations

import enum
import importlib.util
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import run_utils  # noqa: E402
from test_run_utils import CountingRunner  # noqa: E402


class LibraryCase(unittest.TestCase):
    """Values of a library, and what they become in a config."""

    library = ""

    def setUp(self) -> None:
        try:
            self.lib: Any = importlib.import_module(self.library)
        except ImportError:
            self.skipTest(f"{self.library} is not installed")

    def check(self, value: object, wanted: object) -> None:
        found = run_utils._plain(value)
        self.assertEqual((found, type(found)), (wanted, type(wanted)))


class Numpy(LibraryCase):
    """numpy scalars are Python numbers, small arrays lists, large ones summaries."""

    library = "numpy"

    def test_scalars(self) -> None:
        np = self.lib
        self.check(np.float64(0.5), 0.5)
        self.check(np.float32(0.5), 0.5)
        self.check(np.int64(3), 3)
        self.check(np.bool_(True), True)
        self.check(np.str_("a"), "a")
        self.check(np.bytes_(b"a"), "b'a'")
        self.check(np.complex64(1j), "1j")
        self.check(np.longdouble("0.5"), "0.5")
        self.check(np.array(7), 7)

    def test_times_are_iso_text_in_any_unit(self) -> None:
        np = self.lib
        self.check(np.datetime64("2024-01-02"), "2024-01-02")
        precise = np.datetime64("2024-01-02T03", "ns")
        self.check(precise, "2024-01-02T03:00:00.000000000")
        self.check(np.array(["2024-01-02"], "M8[D]"), ["2024-01-02"])

    def test_arrays(self) -> None:
        np = self.lib
        self.check(np.arange(4).reshape(2, 2), [[0, 1], [2, 3]])
        self.check(np.zeros((2, 0)), [[], []])
        self.check(np.array([{"a": 1}, None], object), [{"a": 1}, None])
        text = run_utils._plain(np.zeros((100, 3), np.float32))
        self.assertTrue(text.startswith("<numpy.ndarray shape=(100, 3) dtype=float32"))

    def test_whole_keeps_a_large_array(self) -> None:
        found = run_utils._plain({"a": self.lib.arange(5000)}, whole=True)
        self.assertEqual(found, {"a": list(range(5000))})

    def test_dtypes_and_types_are_names(self) -> None:
        self.check(self.lib.dtype("float32"), "float32")
        self.check(self.lib.float32, "numpy.float32")

    def test_scalar_keys(self) -> None:
        self.check({self.lib.int64(3): 1, self.lib.float32(0.5): 2}, {"3": 1, "0.5": 2})

    def test_metrics_are_numbers(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            values = {"a": self.lib.float32(0.5), "b": self.lib.array([1, 2]).sum()}
            run_utils.log_metrics(folder, values, self.lib.int64(3))
            row = json.loads(Path(folder, "metrics/metrics.jsonl").read_text("ascii"))
        del row["time"]
        self.assertEqual(row, {"step": 3, "a": 0.5, "b": 3})


class Torch(LibraryCase):
    """Tensors are numbers, lists or summaries; nothing is asked of a device."""

    library = "torch"

    def test_tensors(self) -> None:
        torch = self.lib
        self.check(torch.tensor(3), 3)
        self.check(torch.tensor([1.5, 2.0], requires_grad=True), [1.5, 2.0])
        self.check(torch.nn.Parameter(torch.zeros(2)), [0.0, 0.0])
        self.check(torch.tensor([0.5], dtype=torch.bfloat16), [0.5])
        wanted = "<torch.Tensor shape=(20, 30) dtype=torch.float16 device=cpu>"
        self.check(torch.zeros(20, 30, dtype=torch.float16), wanted)

    def test_tensor_without_items_is_summarised(self) -> None:
        wanted = "<torch.Tensor shape=(2,) dtype=torch.float32 device=meta>"
        self.check(self.lib.zeros(2, device="meta"), wanted)

    def test_dtype_device_size_and_module(self) -> None:
        torch = self.lib
        self.check(torch.bfloat16, "torch.bfloat16")
        self.check(torch.device("cuda:1"), "cuda:1")
        self.check(torch.Size([2, 3]), [2, 3])
        self.check(torch.nn.Linear, "torch.nn.modules.linear.Linear")
        self.assertTrue(run_utils._plain(torch.nn.Linear(1, 1)).startswith("Linear("))


class OmegaConf(LibraryCase):
    """Interpolations are resolved; one that leads nowhere, or `???`, stays."""

    library = "omegaconf"

    def test_interpolation_and_missing(self) -> None:
        values = {"a": 1, "b": "${a}", "c": "???", "d": ["${a}"]}
        config = self.lib.OmegaConf.create(values)
        self.check(config, {"a": 1, "b": 1, "c": "???", "d": [1]})
        self.check(config.d, [1])

    def test_interpolation_that_leads_nowhere(self) -> None:
        config = self.lib.OmegaConf.create({"a": 1, "b": "${a}", "c": "${none}"})
        self.check(config, {"a": 1, "b": 1, "c": "${none}"})

    def test_empty_and_none(self) -> None:
        self.check(self.lib.OmegaConf.create({}), {})
        self.check(self.lib.OmegaConf.create([]), [])
        self.check(self.lib.DictConfig(None), None)


class Absl(LibraryCase):
    """FLAGS are the program's own flags, without absl's."""

    library = "absl.flags"

    def test_flags(self) -> None:
        values = self.lib.FlagValues()
        self.lib.DEFINE_float("lr", 0.1, "the learning rate", flag_values=values)
        values(["train.py", "--lr=0.5"])
        self.check(values, {"lr": 0.5})
        self.lib.FLAGS(["train.py"])
        self.check(self.lib.FLAGS, {})


class MlCollections(LibraryCase):
    """References are read; one that has no value does not hide the others."""

    library = "ml_collections"

    def test_config_dict_with_references(self) -> None:
        ml = self.lib
        config = ml.ConfigDict({"a": 1, "n": {"x": [1, 2]}, "t": (1,)})
        config.b = config.get_ref("a")
        wanted = {"a": 1, "b": 1, "n": {"x": [1, 2]}, "t": [1]}
        self.check(config, wanted)
        self.check(ml.FrozenConfigDict(config), wanted)
        self.check(ml.FieldReference(4), 4)

    def test_required_placeholder(self) -> None:
        holder = self.lib.config_dict.required_placeholder(int)
        found = run_utils._plain(self.lib.ConfigDict({"a": 1, "b": holder}))
        self.assertEqual(found["a"], 1)
        self.assertTrue(found["b"].startswith("<unreadable: RequiredValueError"))


class Pydantic(LibraryCase):
    """Models are mappings, extra fields included; hidden secrets stay hidden."""

    library = "pydantic"

    def test_model_v2(self) -> None:
        pydantic = self.lib
        part = pydantic.create_model("Part", x=(float, 0.5))
        model = pydantic.create_model(
            "Model",
            __config__=pydantic.ConfigDict(extra="allow"),
            part=(part, part()),
            path=(Path, Path("a")),
            key=(pydantic.SecretStr, pydantic.SecretStr("hush")),
        )
        wanted = {"part": {"x": 0.5}, "path": "a", "key": "SecretStr('**********')"}
        self.check(model(more=1), {**wanted, "more": 1})

    def test_model_v1(self) -> None:
        try:
            from pydantic import v1
        except ImportError:
            self.skipTest("pydantic.v1 is not here")
        if sys.version_info >= (3, 14):
            self.skipTest("pydantic.v1 does not work from Python 3.14 on")
        self.check(v1.create_model("Model", a=(int, 1))(a=2), {"a": 2})

    def test_dataclass(self) -> None:
        @self.lib.dataclasses.dataclass
        class Model:
            a: int = 1

        self.check(Model(), {"a": 1})


class Attrs(LibraryCase):
    """attrs objects are their attributes, with slots or without."""

    library = "attr"

    def test_objects(self) -> None:
        for slots in (True, False):
            made = self.lib.make_class("Made", ["a", "b"], slots=slots)
            self.check(made(1, made(2, None)), {"a": 1, "b": {"a": 2, "b": None}})


class SciKitLearn(LibraryCase):
    """An estimator is the text that it prints, which has its parameters."""

    library = "sklearn.linear_model"

    def test_estimator(self) -> None:
        self.check({"model": self.lib.Ridge(alpha=0.5)}, {"model": "Ridge(alpha=0.5)"})


class Pandas(LibraryCase):
    """Tables become summaries, times ISO text; runs are the rows of a table."""

    library = "pandas"

    def test_tables(self) -> None:
        pd = self.lib
        found = run_utils._plain(pd.DataFrame({"a": [1, 2]}))
        self.assertRegex(found, r"^<pandas\..*DataFrame shape=\(2, 1\)>$")
        found = run_utils._plain(pd.Series([1.5, 2]))
        self.assertRegex(found, r"^<pandas\..*Series shape=\(2,\) dtype=float64>$")
        self.check(pd.Timestamp("2024-01-02"), "2024-01-02T00:00:00")

    def test_runs_are_the_rows_of_a_table(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for lr in (0.1, 0.2):
                path = run_utils.start_run(folder, f"lr{lr}")
                run_utils.write_config_yaml(path, "train", {"lr": lr, "m": {"n": "q"}})
                run_utils.log_metrics(path, {"loss": 1 / lr}, 1)
            table = self.lib.DataFrame(run_utils.find_runs(folder, sort="lr"))
        self.assertEqual(list(table["config.lr"]), [0.1, 0.2])
        self.assertEqual(list(table["metrics.loss"]), [10.0, 5.0])
        self.assertEqual(list(table["config.m.n"]), ["q", "q"])


class Determinism(unittest.TestCase):
    """Seeds and flags are those of the real libraries; nothing is imported for them."""

    def test_torch(self) -> None:
        if importlib.util.find_spec("torch") is None:
            self.skipTest("torch is not installed")
        code = (
            f"import json, sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "import run_utils, torch\n"
            "torch.manual_seed(42)\n"
            "torch.use_deterministic_algorithms(True)\n"
            "torch.backends.cudnn.benchmark = True\n"
            "before = set(sys.modules)\n"
            "facts = run_utils._determinism()\n"
            "print(json.dumps([facts, sorted(set(sys.modules) - before)]))\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        facts, new_modules = json.loads(done.stdout)
        self.assertEqual(new_modules, [])
        names = ("seed", "deterministic", "cudnn_benchmark", "cudnn_deterministic")
        found = [facts[f"torch_{name}"] for name in names]
        self.assertEqual(found, [42, True, True, False])


class NothingIsImported(unittest.TestCase):
    """Converting never imports a library that was not there."""

    def test_modules(self) -> None:
        class Kind(enum.Enum):
            A = 1

        before = set(sys.modules)
        run_utils._plain([Kind.A, Path("a"), {1}, object(), lambda: 0])
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        self.assertLessEqual(new, {"math"})


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], testRunner=CountingRunner)
