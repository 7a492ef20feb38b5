import pytest
from transformers import GenerationConfig

from core.errors import InvalidRequest
from tests.tiny import build_tiny_tokenizer
from trainer.tokens import TextSoFar, end_token_ids, ignored_sampling_defaults, load_tokenizer, render_prompt

NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_EFFORT = "<{{ messages[0]['role'] }}>{{ reasoning_effort }} {{ messages[0]['content'] }}<end><assistant>"
USER = {"role": "user", "content": "hi"}
DEVELOPER = {"role": "developer", "content": "be kind"}


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_prompt_ends_where_the_answer_begins():
    tokenizer = build_tiny_tokenizer()
    text, ids = render_prompt(tokenizer, [USER])
    assert text == "<user>hi<end><assistant>"
    assert tokenizer.convert_ids_to_tokens(ids) == ["<user>", "h", "i", "<end>", "<assistant>"]


def test_developer_becomes_system():
    text, _ = render_prompt(build_tiny_tokenizer(), [DEVELOPER, USER])
    assert text == "<system>be kind<end><user>hi<end><assistant>"


def test_system_moves_into_the_user_message_where_the_template_refuses_it():
    text, _ = render_prompt(build_tiny_tokenizer(NO_SYSTEM), [DEVELOPER, USER])
    assert text == "<user>be kind\n\nhi<end><assistant>"


def test_a_template_that_refuses_for_another_reason_is_an_invalid_request():
    with pytest.raises(InvalidRequest, match="no user") as caught:
        render_prompt(build_tiny_tokenizer("{{ raise_exception('no user') }}"), [USER])
    assert caught.value.param == "messages"


def test_reasoning_effort_reaches_a_template_that_has_it_and_is_refused_by_others():
    text, _ = render_prompt(build_tiny_tokenizer(WITH_EFFORT), [USER], reasoning_effort="low")
    assert text == "<user>low hi<end><assistant>"
    with pytest.raises(InvalidRequest) as caught:
        render_prompt(build_tiny_tokenizer(), [USER], reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"


def test_a_tokenizer_without_template_is_refused(tmp_path):
    build_tiny_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(InvalidRequest) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.code == "model_without_chat_template"


def test_a_folder_without_tokenizer_is_an_invalid_request(tmp_path):
    with pytest.raises(InvalidRequest):
        load_tokenizer(tmp_path)


def test_end_tokens_come_from_generation_config_tokenizer_and_template():
    other_end = build_tiny_tokenizer("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<user>{% endfor %}")
    assert end_token_ids(other_end, GenerationConfig(eos_token_id=[7, 8])) == {7, 8, 1, 3}
    assert end_token_ids(build_tiny_tokenizer(), None) == {1}


def test_an_ordinary_token_behind_a_turn_is_no_end():
    plain = build_tiny_tokenizer("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}, {% endfor %}")
    assert end_token_ids(plain, None) == {1}


def test_sampling_defaults_of_the_model_are_listed():
    assert ignored_sampling_defaults(GenerationConfig(temperature=0.6, top_p=0.9)) == {"temperature": 0.6, "top_p": 0.9}
    assert ignored_sampling_defaults(GenerationConfig()) == {}


def test_text_before_the_first_of_several_stop_strings():
    tokenizer = build_tiny_tokenizer()
    watch = TextSoFar(tokenizer, ("yz", "c d"))
    ids = encode(tokenizer, "ab c dyz")
    stops = [watch.stopped_text(ids[: count + 1]) for count in range(len(ids))]
    assert stops[:5] == [None] * 5
    assert stops[5] == "ab "


def test_special_tokens_are_not_part_of_the_text():
    tokenizer = build_tiny_tokenizer()
    assert TextSoFar(tokenizer, ()).text([*encode(tokenizer, "ok"), 1]) == "ok"
