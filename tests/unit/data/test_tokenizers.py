"""One loader for every command: each kind of place gives the same tokenizer, and errors are the asker's."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from transformers import AutoTokenizer

from mixtral_recipes.data.records.chat_templates import template_of
from mixtral_recipes.data.tokenizers import load_tokenizer, text_identity, tokenizer_identity
from mixtral_recipes.embedded import resolve
from mixtral_recipes.errors import CheckpointError, DataError, MixtralRecipesWarning

_AS_OBJECT = {"__type": "AddedToken", "content": "</s>"}
TEXT = "Where are  two spaces?\nHere: 中文"


@pytest.fixture(scope="module")
def model_file() -> Path:
    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def test_a_folder_a_checkpoint_and_the_package_agree(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "checkpoint" / "weights").mkdir(parents=True)
    context = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "checkpoint" / "context")
    expected = tokenizer.encode(TEXT)
    for source in (context, tmp_path / "checkpoint", str(context), f"hf://{context}"):
        assert load_tokenizer(source).encode(TEXT) == expected


def test_a_sentencepiece_file_and_its_folder_agree_and_the_folders_template_wins(
    model_file: Path, tmp_path: Path
) -> None:
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    mixtral = load_tokenizer("mistral://mixtral-8x7b")
    assert load_tokenizer(model_file).encode(TEXT) == mixtral.encode(TEXT) == load_tokenizer(tmp_path).encode(TEXT)
    assert load_tokenizer(tmp_path).chat_template == mixtral.chat_template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the configuration"}))
    assert load_tokenizer(tmp_path).chat_template == "from the configuration"
    (tmp_path / "chat_template.jinja").write_text("from its file")
    assert load_tokenizer(tmp_path).chat_template == "from its file"


@pytest.mark.parametrize("error", [DataError, CheckpointError])
def test_who_asks_gets_an_error_of_its_kind(error: type[Any], tmp_path: Path) -> None:
    with pytest.raises(error, match=rf"^{tmp_path}: no tokenizer can be loaded \("):
        load_tokenizer(tmp_path, error=error)


def _changed(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Any:
    """The embedded tokenizer with its tokenizer.json changed."""
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "changed")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def _reverse_ids(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    ordinary = sorted(number for number in vocabulary.values() if number >= 300)
    new = dict(zip(ordinary, reversed(ordinary), strict=True))
    content["model"]["vocab"] = {piece: new.get(number, number) for piece, number in vocabulary.items()}


def _swap_first_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[:40] = reversed(merges[:40])


def _drop_a_merge(content: dict[str, Any]) -> None:
    del content["model"]["merges"][-1]


def _add_a_token(content: dict[str, Any]) -> None:
    last = content["added_tokens"][-1]
    content["added_tokens"].append({**last, "id": len(content["model"]["vocab"]), "content": "<|im_end|>"})


@pytest.mark.parametrize("change", [_reverse_ids, _swap_first_merges, _drop_a_merge, _add_a_token])
def test_whatever_changes_a_tokens_meaning_changes_the_identity(
    change: Callable[[dict[str, Any]], None], tmp_path: Path, tokenizer: Any
) -> None:
    other = _changed(tmp_path, change)
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)
    assert text_identity(other) != text_identity(tokenizer)


def test_the_identity_is_of_what_a_tokenizer_does_not_of_its_files(model_file: Path, tmp_path: Path) -> None:
    original = load_tokenizer(model_file)
    original.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    again.pad_token = again.eos_token
    again(["a", "two words"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    assert tokenizer_identity(again) == tokenizer_identity(original)


def test_a_chat_template_is_part_of_the_identity_and_no_matter_of_plain_text(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)
    assert text_identity(other) == text_identity(tokenizer)
    other.eos_token = "<s>"
    assert text_identity(other) != text_identity(tokenizer)


def _axolotl(folder: Path, model_file: Path, **config: Any) -> Path:
    """A folder as axolotl and others leave it: a SentencePiece model, and the rest in settings."""
    shutil.copy(model_file, folder / "tokenizer.model")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    texts = {"0": "<unk>", "1": "<s>", "2": "</s>", "32000": "<|im_end|>", "32001": "<|im_start|>"}
    settings = {
        "added_tokens_decoder": {number: {"content": text, **flags} for number, text in texts.items()},
        "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "</s>",
        "tokenizer_class": "LlamaTokenizer", "chat_template": "{{ messages[0].content }}", "add_bos_token": True,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return folder


def test_what_stands_beside_a_sentencepiece_model_is_read(model_file: Path, tmp_path: Path) -> None:
    found = load_tokenizer(_axolotl(tmp_path, model_file))
    assert (len(found), found.eos_token, found.pad_token) == (32002, "<|im_end|>", "</s>")
    assert found.encode("<|im_start|>hi<|im_end|>") == [1, 32001, found.encode("hi")[1], 32000]
    assert found.chat_template == "{{ messages[0].content }}"
    assert found.encode("hi") == AutoTokenizer.from_pretrained(tmp_path).encode("hi")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"add_bos_token": False}, [12014]),
        ({"add_eos_token": True}, [1, 12014, 32000]),
        (
            {"add_bos_token": False, "add_eos_token": True, "eos_token": {"__type": "AddedToken", "content": "</s>"}},
            [12014, 2],
        ),
    ],
)
def test_what_is_put_around_a_text_is_what_the_settings_say(
    asked: dict[str, Any], expected: list[int], model_file: Path, tmp_path: Path
) -> None:
    assert load_tokenizer(_axolotl(tmp_path, model_file, **asked)).encode("hi") == expected


def test_tokens_in_added_tokens_json_alone_and_special_tokens_map_are_read(model_file: Path, tmp_path: Path) -> None:
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 32001, "<|im_end|>": 32000}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    found = load_tokenizer(tmp_path)
    assert (len(found), found.eos_token_id, found.convert_tokens_to_ids("<|im_start|>")) == (32002, 32000, 32001)


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
def test_files_of_different_tokenizers_are_refused_by_name(where: str, tmp_path: Path) -> None:
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "mixed")
    wrong = {
        "added_tokens.json": {"<x>": 5000},
        "tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "</s>"}}},
    }
    (folder / where).write_text(json.dumps(wrong[where]))
    with pytest.raises(DataError, match=rf"{where}: token '(<x>|</s>)' has id (5000|7), but"):
        load_tokenizer(folder)


def test_settings_that_cannot_be_read_are_not_left_out(model_file: Path, tmp_path: Path) -> None:
    shutil.copy(model_file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def tekken_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mistral's own, cut to its first 3,000 pieces and 1,000 special tokens."""
    content = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    content["vocab"] = content["vocab"][:3000]
    content["config"]["default_vocab_size"] = 4000
    file = tmp_path_factory.mktemp("tekken") / "tekken.json"
    file.write_text(json.dumps(content))
    return file


def test_a_tekken_file_splits_as_mistral_common_does_and_survives_saving(tekken_file: Path, tmp_path: Path) -> None:
    original = Tekkenizer.from_file(tekken_file)
    shutil.copy(tekken_file, tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')  # with it AutoTokenizer gives no fast one
    found = load_tokenizer(tmp_path)
    assert found.is_fast
    assert len(found) == original.n_words == 4000
    assert found.encode(TEXT) == original.encode(TEXT, bos=True, eos=False)
    assert found.encode("[INST]hi", add_special_tokens=False)[0] == original.get_control_token("[INST]")
    found.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(TEXT) == found.encode(TEXT)


def test_no_tekken_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text('{"vocab": 3}')
    with pytest.raises(DataError, match=r"^\S*tekken\.json: not a tekken tokenizer \(.*\)\.$"):
        load_tokenizer(tmp_path)


def test_two_tokenizers_in_one_folder_are_noticed(tekken_file: Path, tmp_path: Path, tokenizer: Any) -> None:
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "both")
    shutil.copy(tekken_file, folder / "tekken.json")
    with pytest.warns(MixtralRecipesWarning, match="has 1999 tokens, but tekken.json has 4000; tokenizer.json is used"):
        assert tokenizer_identity(load_tokenizer(folder)) == tokenizer_identity(tokenizer)


def test_the_folders_class_does_not_rebuild_its_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "llama")
    (folder / "config.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}')
    assert load_tokenizer(folder).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_templates_with_names(tmp_path: Path) -> None:
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "named")
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("plain")
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    found = load_tokenizer(folder)
    assert template_of(found) == "plain"
    assert found.chat_template.pop("default") == "plain"
    assert found.chat_template == {"tool_use": "with tools"}
    with pytest.raises(DataError, match=r"no chat template named 'default'; it has tool_use"):
        template_of(found)


def test_a_template_in_the_processors_file(tmp_path: Path) -> None:
    folder = shutil.copytree(resolve("embedded://mixtral_tiny"), tmp_path / "old")
    (folder / "chat_template.json").write_text('{"chat_template": "from the processor"}')
    assert load_tokenizer(folder).chat_template == "from the processor"


def _replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"normalizer": {"type": "Replace", "pattern": pattern, "content": content}}


ENDLESS: dict[str, dict[str, Any]] = {
    "an expression": _replacing({"Regex": "(.*)*(.*)*(.*)*x"}, "y"),
    "a long replacement": _replacing({"String": "a"}, "a" * 10_000_000),
    "padding": {
        "padding": {
            "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "x",
        }
    },
}  # fmt: skip


def _tokenizer_with(folder: Path, **parts: Any) -> Path:
    shutil.copytree(resolve("embedded://mixtral_tiny"), folder)
    plain = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(plain | parts))
    return folder


@pytest.mark.parametrize("what", ENDLESS)
def test_a_tokenizer_that_does_not_end_is_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_recipes.data.tokenizer_bounds._SECONDS", 1)
    monkeypatch.setattr("mixtral_recipes.data.tokenizer_bounds._BYTES", 1 << 28)
    with pytest.raises(DataError, match=r"its tokenizer (panics|takes more than 1 seconds)"):
        load_tokenizer(_tokenizer_with(tmp_path / "t", **ENDLESS[what]))


def test_an_expression_that_ends_is_taken(tmp_path: Path) -> None:
    assert load_tokenizer(_tokenizer_with(tmp_path / "t", **_replacing({"Regex": r"\s+"}, " "))).encode("a  b")


def test_an_id_beyond_every_vocabulary(tmp_path: Path) -> None:
    model = json.loads((resolve("embedded://mixtral_tiny") / "tokenizer.json").read_text())["model"]
    model["vocab"]["zzz"] = 2**32 - 2
    with pytest.raises(DataError, match="token 'zzz' has id 4294967294; ids must be below"):
        load_tokenizer(_tokenizer_with(tmp_path / "t", model=model))
