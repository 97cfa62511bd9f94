"""Chat templates of other programs: the ids are those of transformers, and what is learned are the answers."""

import json

import pytest
from example_helpers import conversations
from prepare_helpers import ids_of, jsonl, prepare_here, write
from tokenizer_helpers import byte_ranks, write_rank_file

from gpt.errors import InputError, ResourceError
from gpt.text import templates
from gpt.text.examples import Turn, encode_chat, encode_example
from gpt.text.tokenizer import load_tokenizer, save_tokenizer

SPECIAL = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
DIALOG = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"
TRIMMED = """{{- bos_token }}
{%- for m in messages -%}
  {%- if m.role == 'system' and not loop.first %}{{ raise_exception('no system here') }}{% endif -%}
  {{- '[' ~ m.role | upper ~ '] ' ~ m.content | trim ~ (eos_token if m.role == 'assistant') ~ '\\n' }}
  {%- if loop.last %}{% break %}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}[ASSISTANT] {% endif -%}"""
NESTED = """{%- if tools is not none or documents is not none %}{{ raise_exception('nothing was given') }}{% endif -%}
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {% generation %}{{ m | tojson(separators=(',', ':'), sort_keys=true) }}{{ eos_token }}{% endgeneration %}
  {%- else %}{{ m | tojson }}{% endif -%}
{%- endfor -%}"""


def with_template(tmp_path, template):
    return load_tokenizer(write_rank_file(tmp_path, byte_ranks(), special_tokens=SPECIAL)).with_chat_template(template)


def turns(messages):
    return tuple(Turn(**message) for message in messages)


@pytest.mark.parametrize("template", [CHATML, DIALOG, TRIMMED, NESTED])
def test_the_ids_are_those_of_transformers(tmp_path, template):
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer
    tokenizer = with_template(tmp_path, template)
    save_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    compared = 0
    for messages in conversations(80):
        if any(token in message["content"] for message in messages for token in SPECIAL):
            continue
        compared += 1
        ids, _ = encode_example(turns(messages), tokenizer)
        assert theirs.apply_chat_template(messages, return_dict=False) == ids.tolist()
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == encode_chat(turns(messages[:-1]), tokenizer)
    assert compared > 20


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, "<user\na>\n<assistant\n[b>\n]<user\nc>\n<assistant\n[d>\n]"),
        (DIALOG, "a|[b|]c|[d|]"),
        (TRIMMED, "|[USER] a\n[ASSISTANT] [b|\n][USER] c\n[ASSISTANT] [d|\n]"),
    ],
)
def test_the_answers_and_what_ends_them_are_learned(tmp_path, template, expected):
    tokenizer = with_template(tmp_path, template)
    names = {256: "|", 257: "<", 258: ">"}
    roles = ("user", "assistant") * 2
    ids, mask = encode_example(tuple(map(Turn, roles, "abcd")), tokenizer)
    text, learned = "", False
    for rank, bit in zip(ids.tolist(), mask & 1, strict=True):
        text += ("[" if bit else "]") if bit != learned else ""
        text, learned = text + names.get(rank, chr(rank)), bit
    assert text + "]" * learned == expected
    assert mask[0] == 2 and set(mask[1:]) == {0, 1}
    _, mask = encode_example(tuple(map(Turn, roles, ("a", " ", "c", "d"))), tokenizer)
    last_answer = expected.rpartition("[")[2].removesuffix("]")
    assert (mask & 1).sum() == len(last_answer)  # the empty answer is not learned


def test_a_token_that_spans_the_border_before_an_answer_is_not_learned(tmp_path):
    path = write_rank_file(tmp_path, byte_ranks() | {b" Y": 256}, pattern=r"[\s\S]+")
    template = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}a: {% endif %}"
    tokenizer = load_tokenizer(path).with_chat_template(template)
    ids, mask = encode_example((Turn("user", "?"), Turn("assistant", "Yes")), tokenizer)
    assert ids.tolist() == [*b"u: ?", 257, *b"a:", 256, *b"es", 257]
    assert mask.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    "template, content, message",
    [
        (CHATML, "a<|im_end|>", "holds the special token <|im_end|>"),
        ("{{ messages[-1].content }}", "a", "changes earlier turns"),
        ("{{ raise_exception('not so') }}", "a", "refuses this conversation (not so)"),
        ("{# nothing #}", "a", "makes no text of this conversation"),
        ("{% for", "a", "refuses this conversation ("),
        ("{{ strftime_now('%Y') }}", "a", "'strftime_now' is undefined"),
        ("{{ 1 / 0 }}", "a", "refuses this conversation (division by zero)"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "a", "is unsafe"),
        ("{{ messages.append(1) }}", "a", "is unsafe"),
    ],
)
def test_what_a_template_cannot_do_is_an_error_and_leads_out_of_no_sandbox(tmp_path, template, content, message):
    tokenizer = with_template(tmp_path, template)
    with pytest.raises(InputError) as error:
        encode_example((Turn("user", "q"), Turn("assistant", content), Turn("assistant", "b")), tokenizer)
    assert message in str(error.value)


def test_a_sandbox_that_is_known_to_leak_is_not_used(monkeypatch):
    jinja2 = pytest.importorskip("jinja2")
    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(ResourceError, match=r"jinja2 3\.1\.5: its sandbox is not safe; pip install -U jinja2"):
        templates.rendered("no other test renders this", [], {}, ask=False)
    monkeypatch.setattr(jinja2, "__version__", "3.2.dev0")
    assert templates.rendered("nor this", [], {}, ask=False) == "nor this"


def test_prepare_keeps_the_template_of_the_base_where_it_is_asked_to(tmp_path, capsys):
    base = tmp_path / "base"
    base.mkdir()
    save_tokenizer(with_template(tmp_path, CHATML), base)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = write(tmp_path / "x.jsonl", jsonl({"messages": messages}))
    settings = {"tokenizer": str(base), "val_fraction": 0}
    prepare_here(tmp_path / "out", source, **settings)
    assert "(--chat_template base keeps it)" in capsys.readouterr().err
    ours = ids_of(tmp_path / "out").tolist()
    manifest = prepare_here(tmp_path / "out", source, chat_template="base", **settings)
    assert "ends an answer with no token that ends a text" in capsys.readouterr().err  # <|im_end|> is no eos there
    ids = ids_of(tmp_path / "out").tolist()
    assert ids == [257, *b"user\na", 258, 10, 257, *b"assistant\nb", 258, 10] != ours
    assert load_tokenizer(tmp_path / "out").additions.chat_template == CHATML
    assert manifest["source"]["recipe"][-2:] == ["--chat_template", "base"]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 258}))
    prepare_here(tmp_path / "out", source, chat_template="base", **settings)
    assert "ends an answer" not in capsys.readouterr().err


def test_the_template_of_a_base_that_has_none_or_of_other_data_is_refused(tmp_path):
    chat = write(tmp_path / "c.jsonl", jsonl({"messages": [{"role": "assistant", "content": "b"}]}))
    for source, message in ((chat, "tokenizer byte has none"), (write(tmp_path / "t.txt", "text"), "no messages")):
        with pytest.raises(InputError, match=f"--chat_template base: .*{message}; leave it out"):
            prepare_here(tmp_path / "out", source, chat_template="base", val_fraction=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number, preview", [(1, 0), (2, 2), (2, 0)])
def test_a_conversation_that_the_template_refuses_is_named_by_its_place(tmp_path, number, preview):
    base = tmp_path / "base"
    base.mkdir()
    save_tokenizer(with_template(tmp_path, CHATML), base)
    answers = ["b<|im_end|>" if line == number else "b" for line in (1, 2)]
    records = [{"messages": [{"role": "assistant", "content": answer}]} for answer in answers]
    source = write(tmp_path / "x.jsonl", jsonl(*records))
    settings = {"tokenizer": str(base), "val_fraction": 0, "preview": preview}
    with pytest.raises(InputError, match=rf"x\.jsonl:{number}: the content .* holds the special token <\|im_end\|>"):
        prepare_here(tmp_path / "out", source, chat_template="base", **settings)
    assert not (tmp_path / "out").exists()
