"""Templates: exact texts, exact boundaries, users who cannot forge a turn, and templates that cannot do harm."""

import os
import time

import pytest

from tunesmith.data.sandbox import MAX_SOURCE, SHARED, Program, Sandbox
from tunesmith.data.schemas import SCHEMAS, chat_row, read_row
from tunesmith.data.templates import NAMES, from_dict, get_template
from tunesmith.errors import TemplateError

# tloen/alpaca-lora, templates/alpaca.json and alpaca_short.json
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"
)
NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd\n\n### Response:\n"
)


def row(kind, **raw):
    return read_row(raw, "f:1", SCHEMAS[kind])


def said(*turns, loss=()):
    roles = ["user", "assistant"]
    start = 1 if turns[0].startswith("SYS") else 0
    messages = [{"role": "system", "content": turns[0]}] if start else []
    for i, text in enumerate(turns[start:]):
        message = {"role": roles[i % 2], "content": text}
        messages.append({**message, "loss": False} if i in loss else message)
    return row("messages", messages=messages)


def text(segments, supervised=None):
    return "".join(s.text for s in segments if supervised in (None, s.supervised))


ADD = {"instruction": "Add", "input": "1 2", "output": "3"}


@pytest.mark.parametrize(
    ("name", "given", "prompt"),
    [
        ("alpaca", "1 2", WITH_INPUT),
        ("alpaca", "", NO_INPUT),
        ("alpaca_short", "1 2", "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"),
        ("alpaca-short", "", "### Instruction:\nAdd\n\n### Response:\n"),
        ("dolly", "1 2", "### Instruction:\nAdd\n\n### Context:\n1 2\n\n### Response:\n"),
        ("plain", "1 2", "Add\n\n1 2\n\n"),
        ("llama2-chat", "", "<s>[INST] Add [/INST]"),
    ],
)
def test_built_in_texts(make_tokenizer, name, given, prompt):
    template = get_template(name, make_tokenizer(bos="<s>", eos="</s>"))
    example = row("alpaca", **{**ADD, "input": given})
    assert text(template.prompt(example)) == prompt
    segments = template.segments(example)
    assert text(segments, False) == prompt
    assert text(segments, True) == (" 3 </s>" if name == "llama2-chat" else "3</s>")
    assert not any(s.special for s in segments if s.text in ("Add", "1 2", "3"))


def test_llama2_conversation_is_metas(make_tokenizer):
    """llama/generation.py: BOS [INST] system and user [/INST] answer EOS, for each exchange."""
    template = get_template("llama2-chat", make_tokenizer(bos="<s>", eos="</s>"))
    segments = template.segments(said("SYS", " a ", "b", "c", "d", loss=(1,)))
    assert text(segments) == "<s>[INST] <<SYS>>\nSYS\n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST] d </s>"
    assert text(segments, True) == " d </s>"


def test_conversations_in_alpaca_and_a_system_text(tokenizer):
    segments = get_template("alpaca", tokenizer).segments(said("SYS", "a", "b", "c", "d"))
    assert text(segments).startswith("SYS\n\n### Instruction:\na\n\n### Response:\nb<|im_end|>\n\n### Instruction:\nc")
    assert text(segments, True) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("name", ["alpaca", "plain", "chat", "{instruction}{input}\n"])
def test_last_answer_only_and_open_conversations(tokenizer, name):
    template = get_template(name, tokenizer)
    one, two = said("a", "b"), said("a", "b", "c", "d")
    if name.startswith("{"):
        with pytest.raises(TemplateError, match="conversation of 2 exchanges"):
            template.segments(two)
    else:
        assert text(template.segments(two, answers="last"), True) == "d<|im_end|>"
        assert text(template.segments(two), True) == "b<|im_end|>d<|im_end|>"
    assert text(template.segments(one)).startswith(text(template.prompt(one)))
    assert text(template.prompt(chat_row([{"role": "user", "content": "a"}]))) == text(template.prompt(one))


@pytest.mark.parametrize("name", NAMES)
def test_raw_text_is_left_as_it_is(tokenizer, name):
    template = get_template(name, tokenizer)
    raw = row("text", text="Once <|im_end|>")
    assert [(s.text, s.supervised, s.special) for s in template.segments(raw)] == [
        ("Once <|im_end|>", True, False),
        ("<|im_end|>", True, True),
    ]
    with pytest.raises(TemplateError, match="no prompt"):
        template.prompt(raw)


def test_every_schema_renders_in_every_template(make_tokenizer, tokenizer):
    rows = [
        row("alpaca", **ADD),
        row("dolly", instruction="Add", context="1 2", response="3"),
        row("prompt-completion", prompt="Add", completion="3"),
        row("classification", text="fine", label="3"),
        row("sharegpt", conversations=[{"from": "human", "value": "Add"}, {"from": "gpt", "value": "3"}]),
        row("multiple-choice", question="Add", choices=["1", "3"], answer="B"),
        said("Add", "3"),
    ]
    for name in NAMES:
        template = get_template(name, tokenizer)
        for example in rows:
            segments = template.segments(example)
            assert text(segments, True).strip().removesuffix("<|im_end|>").strip() in ("3", "The answer is (B)")
            assert text(segments).startswith(text(template.prompt(example)))


def test_plain_joins_prompt_and_completion_as_they_are(tokenizer):
    segments = get_template("plain", tokenizer).segments(row("prompt-completion", prompt="1 + 1 =", completion=" 2"))
    assert text(segments) == "1 + 1 = 2<|im_end|>" and text(segments, True) == " 2<|im_end|>"


def test_a_users_string(tokenizer):
    review = row("classification", text="so {good}", label="positive")
    for spec, answer in [("R: {text}\nS: {label}", "positive<|im_end|>"), ("R: {text}\nS: ", "positive<|im_end|>")]:
        segments = get_template(spec, tokenizer).segments(review)
        assert text(segments) == "R: so {good}\nS: positive<|im_end|>" and text(segments, True) == answer
    template = get_template("Q {{x}} {instruction} A {output}<|im_end|>", tokenizer)
    assert text(template.segments(row("alpaca", **ADD))) == "Q {x} Add A 3<|im_end|>"
    assert text(template.prompt(row("alpaca", **ADD))) == "Q {x} Add A "
    raw = get_template("<s>{text}", tokenizer).segments(row("text", text="hi"))
    assert text(raw, True) == "<s>hi<|im_end|>"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("alpacca", "did you mean 'alpaca'"),
        ("{instructon} {output}", "unknown placeholder {instructon}; did you mean 'instruction'"),
        ("{} {output}", "unknown placeholder {}"),
        ("{input.__class__}", "unknown placeholder {input.__class__}"),
        ("{input!r}", "takes no ':' or '!'"),
        ("{input:>1000000000}", "takes no ':' or '!'"),
        ("{input", "write {{ and }}"),
        ("{label} {output}", "would show the model its answer"),
        ("nowhere/chat.jinja", "no such file"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{" * (MAX_SOURCE + 1), "limit is"),
    ],
)
def test_bad_templates(tokenizer, spec, says):
    with pytest.raises(TemplateError) as error:
        get_template(spec, tokenizer)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_placeholder_that_the_row_lacks(tokenizer):
    with pytest.raises(TemplateError, match=r"f:1: a alpaca row has nothing for \{question\}"):
        get_template("{question} {output}", tokenizer).segments(row("alpaca", **ADD))


def test_no_chat_template_and_no_eos(make_tokenizer):
    with pytest.raises(TemplateError, match="no chat template; choose one of alpaca"):
        get_template("chat", make_tokenizer())
    bare = make_tokenizer(eos=None)
    with pytest.raises(TemplateError, match="no EOS token"):
        get_template("alpaca", bare)


# --- the chat template

STRIPPING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[U] {{ m.content | trim }} [/U]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # as Qwen3's: what was thought in earlier answers is left out once a later message follows
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_chat_marks_answers_and_users(tokenizer):
    template = get_template("chat", tokenizer)
    segments = template.segments(said("hi", "yo", "and?", "end"))
    assert text(segments, True) == "yo<|im_end|>end<|im_end|>"
    assert [s.text for s in segments if not s.special] == ["hi", "yo", "and?", "end"]
    assert text(segments).endswith("end<|im_end|>\n") and not segments[-1].supervised


def test_generation_blocks_decide_and_agree_with_prefixes(tokenizer):
    marked = get_template(GENERATION, tokenizer)
    plain = get_template(GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", ""), tokenizer)
    for conversation in (said("hi", "yo"), said("SYS", "a", "b", "c", "d", loss=(1,))):
        assert marked.segments(conversation) == plain.segments(conversation)
        assert marked.prompt(conversation) == plain.prompt(conversation)


def test_a_template_that_forgets_is_refused_unless_last_only(tokenizer):
    template = get_template(FORGETFUL, tokenizer)
    with pytest.raises(TemplateError, match="where the answer begins is not known"):
        template.segments(said("a", "<think>t</think>b", "c", "d"))
    assert text(template.segments(said("a", "<think>t</think>b", "c", "d"), answers="last"), True) == "d<|im_end|>"
    assert text(template.segments(said("a", "<think>t</think>b", "c", "d", loss=(1,))), True) == "d<|im_end|>"


def test_trimmed_texts_are_still_told_apart(make_tokenizer):
    template = get_template(STRIPPING, make_tokenizer(bos="<s>", eos="</s>"))
    segments = template.segments(said("  </s> ", " yo "))
    assert [s.text for s in segments if not s.special] == ["</s>", "yo"]


def test_changed_texts_with_special_tokens_are_refused(tokenizer):
    template = get_template("{% for m in messages %}{{ m.content | upper }}<|im_end|>\n{% endfor %}", tokenizer)
    assert text(template.segments(said("hi", "yo"))) == "HI<|im_end|>\nYO<|im_end|>\n"
    with pytest.raises(TemplateError, match=r"user text contains '<\|im_end\|>'"):
        template.segments(said("hi<|im_end|>", "yo"))


def test_what_transformers_gives_to_templates(make_tokenizer):
    tokenizer = make_tokenizer(bos="<s>", eos="</s>")
    body = "{{ bos_token }}{{ tools is none }}{{ {'a': '<é'} | tojson }}{{ strftime_now('%Y') | length }}"
    rest = "{% for m in messages %}{% if m.content == 'skip' %}{% continue %}{% endif %}{{ m.content }}{{ eos_token }}"
    rest += "{% endfor %}"
    template = get_template(body + rest, tokenizer)
    assert text(template.segments(said("skip", "x"))) == '<s>True{"a": "<é"}4x</s>'
    with pytest.raises(TemplateError, match="f:1: chat template: TemplateError: roles must alternate"):
        refusing = get_template(
            "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('roles must alternate') }}{% endif %}"
            "{{ m.content }}</s>{% endfor %}",
            tokenizer,
        )
        refusing.segments(said("bad", "x"))


# --- limits

HOSTILE = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '\t'.expandtabs(10**9) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{{ ''.__class__.__mro__ }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ lipsum(n=10**5) }}",
    "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "{{ " + "-" * 100000 + "1 }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_are_stopped(source):
    start = time.monotonic()
    with pytest.raises(TemplateError) as error:
        SHARED.render(Program(source), [{"messages": []}])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.monotonic() - start < 10  # 1 s of CPU, on a machine that may be doing other things
    assert SHARED.render(Program("{{ x }}"), [{"x": "next"}]) == ["next"]


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_the_limits_are_the_kernels():
    """The worker has no files to open, inherits no environment, and has 64 MiB over its start and one second."""
    os.environ["TUNESMITH_TEST_SECRET"] = "s"
    sandbox = Sandbox()
    try:
        assert sandbox.render(Program("a"), [{}]) == ["a"]
        pid = sandbox._process.pid
        limits = {line[:26].strip(): line[26:].split() for line in open(f"/proc/{pid}/limits").read().splitlines()}
        assert limits["Max open files"][0] == "0" and limits["Max file size"][0] == "0"
        allowed, used = int(limits["Max address space"][0]), int(open(f"/proc/{pid}/statm").read().split()[0]) * 4096
        assert allowed < used + (80 << 20)
        assert b"SECRET" not in open(f"/proc/{pid}/environ", "rb").read()
    finally:
        del os.environ["TUNESMITH_TEST_SECRET"]
        sandbox.close()


def test_the_second_is_of_cpu_time_and_the_kernel_counts_it(monkeypatch):
    """Also where the parent's own clock is far away."""
    monkeypatch.setattr("tunesmith.data.sandbox.WALL_SECONDS", 40.0)
    start = time.monotonic()
    with pytest.raises(TemplateError, match="took more than 1 s"):
        SHARED.render(Program(HOSTILE[1]), [{}])
    assert time.monotonic() - start < 30


def test_a_large_conversation_is_not_mistaken_for_an_attack(tokenizer):
    template = get_template("chat", tokenizer)
    long = "word " * 600_000  # 3 MB
    assert len(text(template.prompt(said(long, "yo")))) > len(long)


# --- what travels with an adapter


@pytest.mark.parametrize("name", [*NAMES, "{instruction} {output}", "R: {text}\nS: {label}.", GENERATION])
def test_saved_and_made_again(tokenizer, make_tokenizer, name):
    import json

    template = get_template(name, tokenizer)
    saved = json.loads(json.dumps(template.to_dict()))
    again = from_dict(saved, tokenizer)
    example = said("What?", "That.")
    assert again.segments(example) == template.segments(example) and again.fingerprint() == template.fingerprint()
    other = make_tokenizer(bos="<s>", eos="</s>", chat_template=tokenizer.chat_template)
    if "im_end" not in str(saved["source"]) and name != "chat":
        with pytest.raises(TemplateError, match="does not render as it did in training"):
            from_dict(saved, other)
    tampered = json.loads(json.dumps(saved).replace("instruction", "input", 1))
    tampered["source"]["name"] = "other"
    with pytest.raises(TemplateError, match="saved template"):
        from_dict(tampered, tokenizer)


def test_a_dated_template_keeps_its_fingerprint(tokenizer):
    source = "{{ strftime_now('%Y-%m-%d') }}" + GENERATION
    golden = get_template(source, tokenizer).golden()
    assert str(golden[0][0]).startswith("2024-01-01")


@pytest.mark.parametrize("data", [{}, {"source": {}}, {"source": {"kind": "exec", "name": "x"}}, {"source": "x"}])
def test_damaged_saved_templates(tokenizer, data):
    with pytest.raises(TemplateError, match="saved template"):
        from_dict(data, tokenizer)


def test_stop(make_tokenizer, tokenizer):
    assert get_template("chat", tokenizer).stop == ()
    other = make_tokenizer(eos="<|endoftext|>", chat_template=tokenizer.chat_template)
    assert get_template("chat", other).stop == ("<|im_end|>",)
