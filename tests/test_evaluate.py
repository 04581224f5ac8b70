"""`ssl-vit eval` as a command: rows, controls, skipping, refusals."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from ssl_vit.cli import run
from ssl_vit.data.images import ImageStore
from ssl_vit.errors import Failure
from ssl_vit.model.backbone import Backbone
from ssl_vit.model.readout import available, readout
from ssl_vit_eval import evaluation, lazy_images, memory
from ssl_vit_eval.features.extract import Reading, read_all
from ssl_vit_eval.features.tokens import TokenReader
from ssl_vit_eval.probes import logreg
from ssl_vit_eval.probes.knn import KNNProbe
from ssl_vit_eval.probes.selection import Diverged
from ssl_vit_eval.protocols import KINDS
from ssl_vit_eval.rows import RowStore
from ssl_vit_eval.sources import Source, open_source
from ssl_vit_eval.splits import Split
from tests.conftest import errors

pytestmark = pytest.mark.usefixtures("three_classes")


def test_rows_of_a_checkpoint_and_its_controls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "mae.yaml", "--out", "run", "--trainer.accelerator", "cpu"]) == 0
    command = ["eval", "run/last.ckpt", "random:mae.yaml", "pixels:16", "--data", "./pictures", "--out", "out"]
    assert run([*command, "--readouts", "trained", "cls+gap@last2"]) == 0
    assert "run: mae, trained with gap" in capsys.readouterr().out
    store = RowStore("out")
    rows = {(row.method, row.read_with, row.protocol, row.metric): row for row in store.rows()}
    readouts = ["gap", "cls+gap@last2"]
    expected = {("mae", r, p, metric) for r in readouts for p in ("knn", "logreg") for metric in ("top1", "top1_macro")}
    assert {key for key in rows if key[0] == "mae"} == expected
    assert {key[1:3] for key in rows if key[0] == "pixels"} == {("pixels", "knn")}  # a floor, for k-NN only
    trained, start = rows["mae", "gap", "knn", "top1"], rows["random", "gap", "knn", "top1"]
    assert (trained.trained_with, start.trained_with, trained.seed) == ("gap", None, 0)
    assert trained.init == start.checkpoint != trained.checkpoint
    assert (trained.n_train, trained.n_test, trained.dataset, trained.source) == (30, 12, "pictures", "run")
    assert rows["mae", "gap", "logreg", "top1"].grid is not None

    # against scikit-learn's scores and a feature pass by hand
    predictions, labels = store.predictions(trained)
    predictions = predictions[:, 0]
    assert trained.value == pytest.approx((predictions == labels).float().mean().item())
    macro = rows["mae", "gap", "knn", "top1_macro"].value
    assert macro == pytest.approx(balanced_accuracy_score(labels.numpy(), predictions.numpy()))
    assert trained.ci_low < trained.value < trained.ci_high
    source = open_source("run/last.ckpt")
    assert source.backbone is not None
    features = {}
    for split in ("train", "test"):
        files = sorted(Path("pictures", split).rglob("*.png"))
        images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (source.backbone.mean, source.backbone.std))
        with torch.no_grad():
            features[split] = readout("gap")(source.backbone((images - mean) / std))
    order = ["dark", "light", "mid"]
    y = {split: torch.tensor([order.index(f.parent.name) for f in sorted(Path("pictures", split).rglob("*.png"))]) for split in features}
    assert torch.equal(y["test"], labels)
    assert trained.selected.keys() == {"k", "temperature"}
    assert torch.equal(KNNProbe(**trained.selected).fit(features["train"], y["train"]).predict(features["test"]), predictions)


def test_a_second_run_skips_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "random:mae.yaml", "--data", "./pictures", "--out", "out", "--protocols", "knn"]
    assert run([*command, "--readouts", "cls"]) == 0
    before = Path("out/rows.jsonl").read_text()
    assert run([*command, "--readouts", "cls"]) == 0
    assert "done before" in capsys.readouterr().out
    assert Path("out/rows.jsonl").read_text() == before
    assert run([*command, "--readouts", "cls", "gap"]) == 0
    after = Path("out/rows.jsonl").read_text()
    assert after.startswith(before)
    assert after.count("\n") == before.count("\n") + 2


def test_by_default_every_single_readout_is_read() -> None:
    assert run(["eval", "random:mae.yaml", "--data", "./pictures", "--out", "out", "--protocols", "knn"]) == 0
    assert [row.read_with for row in RowStore("out").rows() if row.metric == "top1"] == available(cls=1, registers=2)


def test_features_of_a_readout_do_not_depend_on_the_others() -> None:
    source = open_source("random:mae.yaml")
    images = ImageStore.stacked(torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8))

    def features(specs: list[str], folder: str) -> Mapping[str, torch.Tensor]:
        split = Split(images, torch.zeros(300).long(), ("toy",), None, "pictures", "test", (), lambda: "data")
        reading = Reading.of(source, specs, split, "data", "none", Path(folder), half=())
        assert read_all([reading], images) == {}
        return reading.features()

    for spec, values in features(["cls", "gap/pre", "register1@block0", "cls+gap"], "together").items():
        alone = features([spec], "alone")[spec]
        torch.testing.assert_close(values, alone, rtol=0, atol=1e-6)
        assert len(values) == 300


def test_the_first_process_decides_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another evaluation finishes a file between the looks of two processes, one would wait for the other for ever."""
    images = ImageStore.stacked(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    split = Split(images, torch.zeros(2).long(), ("toy",), None, "pictures", "test", (), lambda: "data")
    reading = Reading.of(open_source("random:mae.yaml"), ["gap"], split, "data", "none", Path("features"), half=())
    assert read_all([reading], images) == {}
    path = reading.files["gap"].path
    before = path.stat().st_ino
    first = lambda mine: [[["gap"]], mine] if isinstance(mine, list) else [mine]  # noqa: E731
    monkeypatch.setattr("ssl_vit_eval.features.extract.gather_objects", first)
    assert read_all([reading], images) == {}  # though it is there by now
    assert path.stat().st_ino != before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["eval"], 2, "SOURCE"),
        (["eval", "nowhere.ckpt"], 2, "there is no checkpoint nowhere.ckpt"),
        (["eval", "mae.yaml"], 1, "mae.yaml is not a readable checkpoint"),
        (["eval", "pictures/tran"], 2, "there is no checkpoint pictures/tran; did you mean 'pictures/train'? give a *.ckpt file"),
        (["eval", "mae.yaml:studnt"], 2, "mae.yaml has no network 'studnt'; did you mean ':student'?"),
        (["eval", "pixel"], 2, "there is no checkpoint pixel; did you mean 'pixels'?"),
        (["eval", "random:nowhere"], 2, "unknown recipe 'nowhere': no such YAML file in /"),
        (["eval", "random:mea.yaml"], 2, "unknown recipe 'mea.yaml'"),
        (["eval", "pixels:big"], 2, "needs a side in pixels"),
        (["eval", "timm:vit_tiny_patch16_24"], 2, "did you mean 'vit_tiny_patch16_224'"),
        (["eval", "random:mae.yaml", "--readouts", "clss"], 2, "did you mean 'cls'?"),
        (["eval", "random:mae.yaml", "--readouts", "trained"], 2, "was not trained with a readout here"),
        (["eval", "random:mae.yaml", "--readouts", "gap@block7"], 2, "choose @block0 to @block1"),
        (["eval", "random:mae.yaml", "--protocols", "knnn"], 2, "did you mean 'knn'?"),
        (["eval", "random:mae.yaml", "--data", "./empty"], 2, "holds no images"),
        (["eval", "random:mae.yaml", "--data", "builtin:foto"], 2, "builtin:photos"),
        (["eval", "random:mae.yaml", "--data", "owner/name"], 1, "owner/name"),
        (
            ["eval", "random:mae.yaml", "--data", "nowhere_folder"],
            1,
            "/nowhere_folder (given as nowhere_folder); read as a Hugging Face id, ",
        ),
        (
            ["eval", "random:mae.yaml", "--data", "pictures/tran"],
            2,
            "did you mean 'pictures/train'? read as a Hugging Face id, the dataset ",
        ),
        (["eval", "random:mae.yaml", "--data", "./pictures", "--test-split", "tset"], 2, "did you mean 'test'?"),
        (["eval", "random:mae.yaml", "--data", "./pictures", "--label-column", "lable"], 2, "did you mean 'label'?"),
        (["eval", "random:mae.yaml", "--data", "./broken"], 1, "3.png"),
        (["eval", "pixels", "--protocols", "logreg"], 2, "raw pixels are a floor for k-NN only"),
        (["eval", "pixels", "--readouts", "foo"], 2, "unknown readout 'foo'"),
        (["eval", "random:mae.yaml", "--suite", "fotos"], 2, "did you mean 'photos'?"),
        (["eval", "random:mae.yaml", "--out", "pictures"], 2, "already holds something else"),
        (["eval", "random:mae.yaml", "--protocol", "knn"], 2, "unknown argument '--protocol'; did you mean '--protocols'?"),
        (["compare", "pictures"], 2, "holds no rows"),
        (["compare", "nowhere"], 2, "there is no folder 'nowhere'"),
        (["study", "quickstrat"], 2, "did you mean 'quickstart'?"),
        (["study", "nowhere.yaml"], 2, "unknown study 'nowhere.yaml': no such YAML file in /"),
        (["study", "bda.yaml"], 2, "did you mean 'bad.yaml'? choose one of: quickstart"),
        (["study", "bad.yaml"], 2, "unknown key 'recipe'; did you mean 'recipes'?"),
        (["evaluate"], 2, "unknown command 'evaluate'"),
        (["quickstart", "--steps", "3"], 2, "unknown argument '--steps'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("bad.yaml").write_text("recipe: [mae.yaml]\n")
    for name in ("a", "b"):
        Path("broken", name).mkdir(parents=True)
        for number in range(6):
            Path("broken", name, f"{number}.png").write_bytes(Path("pictures/train/dark/00.png").read_bytes())
    Path("broken/b/3.png").write_text("<html>404</html>")
    before = sorted(path for path in Path().rglob("*.*") if path.suffix != ".features")
    assert run(arguments) == code
    lines = errors(capsys)
    assert len(lines) == 1
    assert message in lines[0]
    assert lines[0].count("did you mean") <= 1
    assert sorted(path for path in Path().rglob("*.*") if path.suffix != ".features") == before


def test_a_test_set_made_from_train_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "random:mae.yaml", "--data", "./pictures/train", "--out", "out", "--protocols", "knn"]) == 0
    assert "train has no split to test on: a stratified 20% of its 'train' (seed 0) is taken out as the test set" in capsys.readouterr().out


def test_a_suite_is_a_list_of_data() -> None:
    Path("mine.yaml").write_text("data: [./pictures, ./pictures/train]\n")
    assert run(["eval", "pixels:16", "--suite", "mine.yaml", "--out", "out", "--protocols", "knn"]) == 0
    assert [row.dataset for row in RowStore("out").rows() if row.metric == "top1"] == ["pictures", "train"]
    assert run(["compare", "out"]) == 0
    assert "pixels:16" in Path("out/report.html").read_text()


EVAL = ["eval", "random:mae.yaml", "--data", "./pictures", "--out", "out", "--readouts", "cls", "gap"]


def test_memory_that_runs_out_costs_the_run_that_asked_for_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setitem(KINDS, "logreg", KINDS["logreg"]._replace(run=full))
    assert run([*EVAL, "--protocols", "logreg", "knn"]) == 1
    assert "2 of 4 runs failed, the others are kept: memory ran out (CUDA out of memory); " in errors(capsys)[0]
    assert {row.protocol for row in RowStore("out").rows()} == {"knn"}


def test_what_memory_is_too_small_for_is_refused_before_work(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: logreg.memory(30, 24) - 1)
    assert run([*EVAL, "--protocols", "logreg"]) == 1
    assert "logreg of cls works on 0.5 GiB" in errors(capsys)[0]
    assert not Path("out").exists()
    monkeypatch.setattr(memory, "available_memory", lambda: logreg.memory(30, 24))
    assert run([*EVAL, "--protocols", "logreg"]) == 0


def test_images_are_decoded_once_for_all_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    original = lazy_images.decode
    monkeypatch.setattr(lazy_images, "MEMORY_SHARE", 0.0)  # nothing is kept
    monkeypatch.setattr(lazy_images, "decode", lambda data, name: decoded.append(name) or original(data, name))  # type: ignore[func-returns-value]
    command = ["eval", "random:mae.yaml", "random:dino.yaml", "pixels:16", "--data", "./pictures", "--out", "out", "--protocols", "knn"]
    assert run(command) == 0
    assert len(decoded) == len(set(decoded)) == 30 + 12
    assert {row.source for row in RowStore("out").rows()} == {"random:mae", "random:dino", "pixels:16"}


def test_a_source_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = Source.features

    def broken(self: Source, images: torch.Tensor, specs: list[str]) -> dict[str, torch.Tensor]:
        found = original(self, images, specs)
        return {spec: values * float("nan") for spec, values in found.items()} if self.name == "random:mae" else found

    monkeypatch.setattr(Source, "features", broken)
    assert run(["eval", "random:mae.yaml", "random:dino.yaml", "--data", "./pictures", "--out", "out", "--protocols", "knn"]) == 1
    assert "could not be evaluated: random:mae on ./pictures" in errors(capsys)[0]
    assert {row.source for row in RowStore("out").rows()} == {"random:dino"}
    assert not list(Path("out/features").glob("*.partial"))


@pytest.fixture
def gap_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Source.features

    def broken(self: Source, images: torch.Tensor, specs: list[str]) -> dict[str, torch.Tensor]:
        return {spec: values * (float("nan") if spec == "gap" else 1) for spec, values in original(self, images, specs).items()}

    monkeypatch.setattr(Source, "features", broken)


def written() -> set[tuple[str, str, str]]:
    return {(row.source, row.protocol, row.read_with) for row in RowStore("out").rows()}


@pytest.mark.usefixtures("gap_is_not_finite")
def test_a_readout_that_is_not_finite_leaves_the_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*EVAL, "--protocols", "knn", "linear-dino"]) == 1
    message = errors(capsys)[0]
    assert "2 of 4 runs failed, the others are kept: random:mae: pictures train: image 0 read with gap gives features" in message
    assert written() == {("random:mae", "knn", "cls"), ("random:mae", "linear-dino", "cls")}
    assert not list(Path("out/features").glob("*.partial"))
    assert len(list(Path("out/features").glob("*.features"))) == 2  # cls of train and of test


def test_tokens_that_memory_is_too_small_for_cost_what_reads_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(TokenReader, "sequences", full)
    assert run([*EVAL, "--protocols", "knn", "attentive"]) == 1
    assert "2 of 4 runs failed, the others are kept: memory ran out (CUDA out of memory); " in errors(capsys)[0]
    assert {protocol for _, protocol, _ in written()} == {"knn"}


def test_a_backbone_without_room_on_the_device_costs_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, asked = Backbone.to, []

    def full(self: Backbone, device: torch.device) -> Backbone:
        asked.append(self)
        if self is asked[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, device)

    monkeypatch.setattr(Backbone, "to", full)
    assert run(["eval", "random:dino.yaml", *EVAL[1:], "--protocols", "knn"]) == 1
    said = capsys.readouterr()
    assert "random:dino on ./pictures is left out: memory ran out" in said.out
    assert {source for source, _, _ in written()} == {"random:mae"}


def test_diagnostics_that_fail_hide_no_other_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(message: str) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise Failure(message)

        return fail

    monkeypatch.setattr(evaluation, "examine", fails("no room for maps"))
    monkeypatch.setitem(KINDS, "logreg", KINDS["logreg"]._replace(run=fails("no minimum")))
    assert run([*EVAL[:-1], "--protocols", "logreg", "knn", "--diagnostics"]) == 1
    message = errors(capsys)[0]
    assert "no minimum; no room for maps" in message
    assert {protocol for _, protocol, _ in written()} == {"knn"}


def test_a_joint_run_copies_the_features_of_one_readout_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    together = []

    def spied(parameters: Mapping[str, object], train: Mapping[str, torch.Tensor], *_: object) -> None:
        together.append(list(train))
        raise Failure("seen")

    monkeypatch.setitem(KINDS, "linear", KINDS["linear"]._replace(run=spied))
    assert run([*EVAL[:-2], "cls+gap", "cls+register", "--protocols", "linear-dino", "--controls", "width"]) == 1
    assert together[0] == ["cls+gap", "cls+register"]
    assert sorted(together[1:]) == [["cls+gap"]] * 2 + [["cls+register"]] * 2  # two terms each


def test_a_readout_that_diverges_in_a_joint_run_costs_no_other(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = KINDS["linear"].run

    def diverges(parameters: Mapping[str, object], train: Mapping[str, torch.Tensor], *rest: object) -> None:
        found = original(parameters, train, *rest)
        raise Diverged(["readout 'gap': it diverged"], {"cls": found["cls"]})

    monkeypatch.setitem(KINDS, "linear", KINDS["linear"]._replace(run=diverges))
    assert run([*EVAL, "--protocols", "linear-dino"]) == 2
    assert "1 of 2 runs failed, the others are kept: readout 'gap': it diverged" in errors(capsys)[0]
    assert written() == {("random:mae", "linear-dino", "cls")}


def test_the_copy_of_the_width_control_is_counted_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or the GPU's memory is asked
    width, n, m = 2 * 24, 30, 12
    copied, fitted = 4 * (n + m) * width, logreg.memory(n, width)
    for protocol, most in (("logreg", copied + fitted), ("linear-dino", copied)):
        for free in (most, most - 1):
            monkeypatch.setattr("ssl_vit_eval.memory.available_memory", lambda free=free: free)
            out = f"{protocol}-{free - most}"
            code = run([*EVAL[:4], "--readouts", "cls+gap", "--protocols", protocol, "--controls", "width", "--out", out])
            assert code == (free < most)
            message = " ".join(errors(capsys))
            assert ("2 of 3 runs failed" in message) == (free < most)


def test_a_joint_run_shares_out_its_time_by_what_was_trained() -> None:
    assert run([*EVAL, "cls+gap", "--protocols", "linear-dino"]) == 0
    rows = {row.read_with: row for row in RowStore("out").rows() if row.metric == "top1"}
    one, two = rows["cls"], rows["cls+gap"]
    assert one.seconds == rows["gap"].seconds
    assert one.parameters is not None
    assert two.parameters is not None
    assert two.seconds / one.seconds == pytest.approx(two.parameters / one.parameters, rel=0.05)
