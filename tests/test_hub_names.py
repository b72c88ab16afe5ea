"""Revisions of models and data sets; what a run records of them; adapters on the Hub."""

import json
import shutil

import pytest
from helpers import BASE, CHECKPOINT, answers_of, arguments, digest_of_weights
from hub_repositories import CAULDRON, MINI, MODEL, VIDEOS
from safetensors.torch import load_file, save_file
from test_hub import own_copy, reachable  # noqa: F401 (a fixture)

import convert_ucf101
import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_ucf101 as script
from phi3v import hub_names
from phi3v.errors import InputError
from phi3v.model.loading import find_saved
from tools import ask
from tools import merge_adapter as merge_tool

RUN = "--no-tqdm --dataloader_num_workers 0 --num_crops 2 --max_new_tokens 4 --max_eval_samples 2".split()
TRAIN = [*RUN, *"--no_eval_before --batch_size 4 --max_train_samples 8 --max_steps 2 --save_steps 1".split()]
TRAIN += "--report_to none --learning_rate 5e-3 --warmup_steps 0 --deepspeed none".split()
LORA = "--use_lora --lora_rank 4 --train_separators".split()


def test_names_and_revisions(tmp_path, monkeypatch):
    split = hub_names.split_revision
    assert split("owner/name") == ("owner/name", None)
    assert split("owner/name@v2") == ("owner/name", "v2")
    assert split("owner/name@refs/pr/3") == ("owner/name", "refs/pr/3")
    assert split("/models/a@b") == ("/models/a@b", None) and split("a@b") == ("a@b", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name@v2").mkdir(parents=True)
    assert split("owner/name@v2") == ("owner/name@v2", None)  # a folder of that name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model_name_or_path owner/name@", "names no revision behind the @: give a branch, a tag or a commit"),
        (
            "--model_name_or_path owner/name@a --model_revision b",
            "owner/name@a and --model_revision b contradict each other",
        ),
        (f"--model_name_or_path {CHECKPOINT} --model_revision b", "--model_revision b is for a name on the Hub"),
        ("--data_revision b", "--data_revision b is for data on the Hub, and contradicts --data_dir"),
    ],
)
def test_wrong_revisions_are_one_line(flags, message, toy_data, tmp_path):
    with pytest.raises(InputError) as error:
        script.main(["--data_dir", str(toy_data), "--output_dir", str(tmp_path), *flags.split()])
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given", ["a,b", "x@", "@y", "one@v1", "a/b@1,a/b@2", "a/b@1,", ""])
def test_wrong_data_revisions_are_refused(given):
    with pytest.raises(
        InputError, match="give a branch, a tag or a commit; or for several data sets OWNER/NAME@REVISION"
    ):
        hub_names.data_revisions(given)


def test_data_revisions_of_several_data_sets():
    assert hub_names.data_revision("a/b", "v1") == "v1" and hub_names.data_revision("a/b", None) is None
    several = "a/b@v1, c/d@refs/pr/1"
    assert hub_names.data_revision("a/b", several) == "v1" and hub_names.data_revision("c/d", several) == "refs/pr/1"
    assert hub_names.data_revision("e/f", several) is None


# ---- What a run records


def scaled(folder, factor: float):
    """Changes the weights in a folder."""
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.fixture
def model(reachable, tmp_path):  # noqa: F811
    """The model's folder on the Hub, with a tag v1 for what it holds now, and other weights in main."""
    folder = own_copy(reachable, tmp_path / "root", f"models/{MODEL}")
    shutil.copytree(folder, folder.with_name(f"{folder.name}@v1"))
    scaled(folder, 1.01)
    return folder


def settings(checkpoint) -> dict:
    return json.loads((checkpoint / "complete.json").read_text())["settings"]


def test_commits_are_recorded_and_an_adapter_keeps_its_base(reachable, model, toy_data, tmp_path):  # noqa: F811
    out, (main, v1) = tmp_path / "out", (reachable.commit(MODEL, revision=name) for name in ("main", "v1"))
    assert main != v1
    script.main(arguments(toy_data, out, *LORA, "--model_name_or_path", f"{MODEL}@v1", common=TRAIN))
    for folder in (out, out / "checkpoint-1"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (MODEL, v1)
    assert (
        settings(out / "checkpoint-1")["model"] == v1 and json.loads((out / "finished.json").read_text())["model"] == v1
    )
    assert settings(out / "checkpoint-1")["model_name_or_path"] == MODEL
    card = (out / "README.md").read_text()
    assert f"{MODEL} (commit {v1}) fine-tuned on" in card and f"| commit of {MODEL} | {v1} |" in card
    assert f'from_pretrained("{MODEL}", revision="{v1}", ' in card
    assert v1 in (out / "report.html").read_text()

    # The saved adapter is loaded with the base that it was trained on, by every program.
    saved = find_saved(str(out))
    assert saved.commits == {MODEL: v1} and saved.base_folder.name == v1
    flags = ["--model_name_or_path", str(out), "--evaluate_only"]
    script.main(arguments(toy_data, tmp_path / "evaluated", *flags, common=RUN))
    assert answers_of(tmp_path / "evaluated" / "evaluation-val.json") == answers_of(out / "eval_after.json")
    assert v1 in (tmp_path / "evaluated" / "evaluation-val.html").read_text()
    merge_tool.main([str(out), str(tmp_path / "merged"), "--dtype", "fp32"])
    name = "model.embed_tokens.weight"  # no adapter changes it
    merged = load_file(tmp_path / "merged" / "model.safetensors")[name]
    weights = {
        k: t for path in model.with_name(f"{model.name}@v1").glob("*.safetensors") for k, t in load_file(path).items()
    }
    assert merged.equal(weights[name].float())
    assert ask.load(ask.parse_arguments([str(out)]))[1].get_base_model().get_parameter(name).equal(merged)
    assert str(tmp_path) not in (tmp_path / "merged" / "config.json").read_text()


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_resumed_run_notices_that_the_hub_has_other_weights(mode, reachable, model, toy_data, tmp_path):  # noqa: F811
    out, flags = tmp_path / "out", LORA if mode == "lora" else []
    flags = arguments(toy_data, out, *flags, "--model_name_or_path", MODEL, common=TRAIN)
    script.main(flags)
    before, resume = reachable.commit(MODEL), ["--resume_from_checkpoint", "auto"]
    scaled(model, 1.01)
    (out / "finished.json").unlink()
    shutil.rmtree(out / "checkpoint-2")
    with pytest.raises(InputError) as error:
        script.main([*flags, *resume])
    assert f'model: "{before}" then, "{reachable.commit(MODEL)}" now' in str(error.value)
    assert f"--model_revision {before} trains from the former commit" in str(error.value)
    assert "--resume_anyway" in str(error.value)
    assert script.main([*flags, *resume, "--model_revision", before]).state.global_step == 2
    # A checkpoint of an earlier version has no commit: it resumes.
    manifest = json.loads((out / "checkpoint-1" / "complete.json").read_text())
    manifest["settings"]["model"] = None
    (out / "checkpoint-1" / "complete.json").write_text(json.dumps(manifest))
    (out / "finished.json").unlink()
    shutil.rmtree(out / "checkpoint-2")
    assert script.main([*flags, *resume]).state.global_step == 2


def test_settings_of_local_runs_name_no_commits(finished_run):
    stored = settings(finished_run("full") / "checkpoint-2")
    assert {"data_commits", "model_revision", "data_revision"}.isdisjoint(stored) and len(stored["model"]) == 16
    assert "ommit" not in (finished_run("full") / "README.md").read_text()


def test_revisions_of_data(reachable, tmp_path):  # noqa: F811
    mini = own_copy(reachable, tmp_path / "root", f"datasets/{MINI}", f"datasets/{CAULDRON}")
    for name in (MINI, CAULDRON):
        folder = reachable.root / "datasets" / name
        shutil.copytree(folder, folder.with_name(f"{folder.name}@v1"))
    (mini / "new.txt").write_text("new")
    commits = {name: reachable.commit(name, "datasets", "v1") for name in (MINI, CAULDRON)}
    assert commits[MINI] != reachable.commit(MINI, "datasets")

    def train(out, *flags):
        own = ["--output_dir", str(tmp_path / out), "--model_name_or_path", str(CHECKPOINT)]
        docvqa.main([*own, *TRAIN, *flags])
        return tmp_path / out

    out = train("mini", "--data_revision", "v1")
    assert settings(out / "checkpoint-1")["data_commits"] == {MINI: commits[MINI]}
    assert commits[MINI] in (out / "report.html").read_text()
    assert f"| commit of {MINI} | {commits[MINI]} |" in (card := (out / "README.md").read_text())
    assert f"datasets:\n- {MINI}\n" in card
    (out / "finished.json").unlink()
    with pytest.raises(InputError, match=f"--data_revision {MINI}@{commits[MINI]} trains on the former commit"):
        train("mini", "--resume_from_checkpoint", "auto")

    out = train("both", "--full_train", "--data_revision", f"{MINI}@v1,{CAULDRON}@{commits[CAULDRON]}")
    assert settings(out / "checkpoint-1")["data_commits"] == commits
    with pytest.raises(InputError, match=f"names {CAULDRON}, which this run does not read; it reads {MINI}"):
        train("unused", "--data_revision", f"{CAULDRON}@v1")
    with pytest.raises(InputError, match=f"{MINI}@v9 can't be fetched .*no such revision"):
        train("wrong", "--data_revision", "v9")


@pytest.mark.slow
def test_the_revision_of_videos(reachable, tmp_path):  # noqa: F811
    videos = own_copy(reachable, tmp_path / "root", f"datasets/{VIDEOS}")
    shutil.copytree(videos, videos.with_name(f"{videos.name}@v1"))
    (videos / "UCF101_subset.tar.gz").write_bytes(b"damaged")
    assert convert_ucf101.main(["--out_dir", str(tmp_path / "out"), "--data_revision", "v1"]) == 0
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (manifest["repository"], manifest["commit"]) == (VIDEOS, reachable.commit(VIDEOS, "datasets", "v1"))


# ---- Adapters on the Hub


@pytest.fixture
def adapter(reachable, model, toy_data, tmp_path):  # noqa: F811
    """The output folder of a run with LoRA, which is also the repository me/adapter on the Hub."""
    out = tmp_path / "adapter"
    script.main(arguments(toy_data, out, *LORA, "--model_name_or_path", MODEL, common=TRAIN))
    scaled(model, 1.01)  # main is another commit now
    shutil.copytree(out, reachable.root / "models" / "me" / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    reachable.requests.clear()
    return out


def test_an_adapter_of_the_hub_is_as_a_local_one(reachable, adapter, toy_data, tmp_path, capsys):  # noqa: F811
    messages = []
    for name in (str(adapter), "me/adapter", f"me/adapter@{reachable.commit('me/adapter')}"):
        with pytest.raises(InputError) as error:
            script.main(arguments(toy_data, tmp_path / "refused", "--model_name_or_path", name, common=TRAIN))
        messages.append(str(error.value).replace(str(adapter), "me/adapter"))
    assert len(set(messages)) == 1 and f"me/adapter holds an adapter: give its base {MODEL}" in messages[0]
    assert not [name for name in reachable.fetched() if name.startswith("me/") and name.endswith(".safetensors")]

    # With its own num_crops, which is neither the script's default nor the base's.
    results, crops = [], json.loads((adapter / "preprocessor_config.json").read_text())["num_crops"]
    assert crops == 2
    for number, name in enumerate((str(adapter), "me/adapter")):
        own = [*BASE, *"--max_new_tokens 4 --max_eval_samples 2 --evaluate_only".split(), "--model_name_or_path", name]
        script.main(arguments(toy_data, tmp_path / str(number), common=own))
        results.append(answers_of(tmp_path / str(number) / "evaluation-val.json"))
    assert results[0] == results[1] == answers_of(adapter / "eval_after.json")

    digests = []
    for number, name in enumerate((str(adapter), "me/adapter")):
        out = tmp_path / f"further-{number}"
        script.main(arguments(toy_data, out, "--use_lora", "--adapter", name, common=TRAIN))
        digests.append(digest_of_weights(out))
    assert digests[0] == digests[1] != digest_of_weights(adapter)
    stored = json.loads((tmp_path / "further-1" / "finished.json").read_text())
    assert stored["adapter"] == f"me/adapter@{reachable.commit('me/adapter')}"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (stored["model_name_or_path"], stored["model"]) == (
        MODEL,
        config["revision"],
    )  # not main, which has moved on

    answers = []
    for name in (str(adapter), "me/adapter"):
        ask.main([name, "--question", "Where is it?", "--max_new_tokens", "8"])
        answers.append(capsys.readouterr().out.splitlines()[-1])
    assert answers[0] == answers[1]
    for number, name in enumerate((str(adapter), "me/adapter")):
        merge_tool.main([name, str(tmp_path / f"merged-{number}"), "--dtype", "fp32"])
    one, other = (load_file(tmp_path / f"merged-{number}" / "model.safetensors") for number in (0, 1))
    assert all(one[name].equal(other[name]) for name in one)
    assert {"me/adapter/separators.safetensors", "me/adapter/adapter_model.safetensors"} <= set(reachable.fetched())


def test_what_is_no_adapter_can_not_be_merged_and_has_no_base(reachable, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match=f"{MODEL} has no adapter_config.json: give the output folder of a LoRA run"):
        merge_tool.main([MODEL, str(tmp_path / "merged")])
    with pytest.raises(InputError, match=f"--base x/y is only for an adapter, but {MODEL} has no adapter_config.json"):
        ask.load(ask.parse_arguments([MODEL, "--base", "x/y"]))
    assert not [name for name in reachable.fetched() if name.endswith(".safetensors")]


def test_the_output_of_a_full_run_on_the_hub_is_evaluated_with_its_own_num_crops(reachable, toy_data, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    script.main(arguments(toy_data, out, "--model_name_or_path", str(CHECKPOINT), common=TRAIN))
    reachable.root = tmp_path / "root"
    shutil.copytree(out, reachable.root / "models" / "me" / "full", ignore=shutil.ignore_patterns("checkpoint-*"))
    own = [*BASE, *"--max_new_tokens 4 --max_eval_samples 2 --evaluate_only --model_name_or_path me/full".split()]
    script.main(arguments(toy_data, tmp_path / "evaluated", common=own))
    assert answers_of(tmp_path / "evaluated" / "evaluation-val.json") == answers_of(out / "eval_after.json")


def test_a_lost_base_asks_for_another(reachable, adapter, tmp_path):  # noqa: F811
    shutil.rmtree(reachable.root / "models" / MODEL)
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    with pytest.raises(InputError, match=f"{MODEL}@.* can't be fetched .*: give --base"):
        ask.load(ask.parse_arguments([str(adapter)]))
    with pytest.raises(InputError, match=f"{MODEL}@.* can't be fetched .*: give --base"):
        merge_tool.main([str(adapter), str(tmp_path / "merged")])
    assert ask.load(ask.parse_arguments([str(adapter), "--base", str(CHECKPOINT)]))
