"""Every schema is recognised by its keys; every bad row is named by file, line and field."""

import pytest

from tunesmith.data.schemas import (
    SCHEMAS,
    Turn,
    chat_row,
    default_instruction,
    find_schema,
    labels,
    read_row,
    recognise,
    with_instruction,
)
from tunesmith.errors import DataError

GOOD = {
    "alpaca": {"instruction": "Add", "input": "1 2", "output": "3"},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    "prompt-completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "text": {"text": "Once upon a time"},
    "classification": {"text": "fine film", "label": "positive"},
    "dolly": {"instruction": "Sum up", "context": "a b c", "response": "abc"},
    "multiple-choice": {"question": "Which?", "choices": ["cat", "dog"], "answer": 1},
}


def read(raw, where="f.jsonl:3"):
    return read_row(raw, where, recognise(raw, where))


@pytest.mark.parametrize("kind", GOOD)
def test_recognised_by_keys_and_by_force(kind):
    extra = {**GOOD[kind], "id": 7}
    assert recognise(extra, "f:1").name == kind
    row = read_row(extra, "f:1", find_schema(kind))
    assert row.kind == kind and row.source == "f:1"
    assert row.turns[-1].role == "assistant" and row.turns[-1].supervised


def test_values_arrive_where_they_belong():
    assert set(GOOD) == set(SCHEMAS)
    assert read(GOOD["alpaca"]).turns == (Turn("user", "Add\n\n1 2"), Turn("assistant", "3", True))
    assert read(GOOD["dolly"]).fields["input"] == "a b c"
    choice = read(GOOD["multiple-choice"])
    assert choice.choices == ("cat", "dog") and choice.label == "B"
    assert choice.turns[0].text == "Which?\n(A) cat\n(B) dog" and choice.turns[1].text == "The answer is (B)"
    assert read({**GOOD["classification"], "label": 1}).label == "1"


def test_history_system_and_loss():
    raw = {"instruction": "c", "input": "", "output": "d", "system": "S", "history": [["a", "b"]]}
    assert [t.role[0] + t.text for t in read(raw).turns] == ["sS", "ua", "ab", "uc", "ad"]
    said = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "loss": False},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    assert [t.supervised for t in read({"messages": said}).turns] == [False, False, False, True]


@pytest.mark.parametrize("answer", [1, "B", "b", "(B)", "dog"])
def test_answers_of_a_choice(answer):
    assert read({**GOOD["multiple-choice"], "answer": answer}).label == "B"


def test_an_option_text_wins_over_a_letter():
    assert read({"question": "q", "choices": ["B", "A"], "answer": "A"}).label == "B"


def turn(role, text="x", **more):
    return {"role": role, "content": text, **more}


BAD = [
    ({"instruction": 3, "output": "a"}, "'instruction' must be a string, not a int"),
    ({"instruction": "a", "output": "  "}, "'output' is empty"),
    ({"instruction": "a", "output": None}, "'output' must be a string, not null"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, "history[0]"),
    ({"text": "a", "label": True}, "'label'"),
    ({"text": "a", "label": ""}, "'label' is empty"),
    ({"text": "\ud800"}, "surrogate"),
    ({"messages": []}, "an empty list"),
    ({"messages": "hi"}, "must be a list of messages"),
    ({"messages": [turn("assistant")]}, "message 0 is from 'assistant'"),
    ({"messages": [turn("user"), turn("user")]}, "message 1 is from 'user'"),
    ({"messages": [turn("user")]}, "must end with the assistant"),
    ({"messages": [turn("system"), turn("system")]}, "message 1 is from 'system'"),
    ({"messages": [turn("usr"), turn("assistant")]}, "did you mean 'user'"),
    ({"messages": [{"role": "user", "contents": "x"}]}, "did you mean 'contents'"),
    ({"messages": [turn("user", loss=True), turn("assistant")]}, "only assistant messages"),
    ({"messages": [turn("user"), turn("assistant", loss=1)]}, "must be true or false"),
    ({"question": "q", "choices": ["a"], "answer": 0}, "'choices'"),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, "'answer' is 2"),
    ({"question": "q", "choices": ["a", "b"], "answer": True}, "'answer'"),
    ({"question": "q", "choices": "a,b", "answer": "a"}, "'choices' must be a list"),
]


@pytest.mark.parametrize(("raw", "says"), BAD)
def test_bad_rows_name_file_line_and_field(raw, says):
    with pytest.raises(DataError) as error:
        read(raw)
    message = str(error.value)
    assert message.startswith("f.jsonl:3") and says in message and "\n" not in message


def test_rows_of_another_schema_and_unknown_keys():
    with pytest.raises(DataError, match=r"f:9: field 'output' is missing.*one schema"):
        read_row({"instruction": "a", "outptu": "b"}, "f:9", SCHEMAS["alpaca"])
    with pytest.raises(DataError, match=r"keys instructon, outputs; did you mean 'instruction'.*Known: alpaca"):
        recognise({"instructon": 1, "outputs": 2}, "f:1")
    with pytest.raises(
        DataError, match=r"more than one schema \(alpaca and messages\); choose one with data.schema=alpaca"
    ):
        recognise({**GOOD["alpaca"], **GOOD["messages"]}, "f:1")
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        find_schema("alpacca")
    with pytest.raises(DataError, match="must be an object"):
        recognise([1], "f:1")


def test_a_ready_made_text_beside_other_keys_is_left_alone():
    assert recognise({**GOOD["alpaca"], "text": "all of it"}, "f:1").name == "alpaca"
    assert recognise({**GOOD["messages"], "text": "all of it", "label": "x"}, "f:1").name == "messages"


def test_labels_and_their_instruction():
    rows = [read({"text": "a", "label": name}) for name in ("positive", "negative", "positive")]
    assert labels(rows) == ("negative", "positive")
    assert default_instruction(labels(rows)) == "Classify the sentiment of the text as negative or positive."
    assert default_instruction(["a", "b", "c"]) == "Classify the text as a, b or c."
    asked = with_instruction(rows, "Which?")[0]
    assert asked.turns[0].text == "Which?\n\na" and asked.fields["instruction"] == "Which?"
    assert rows[0].turns[0].text == "a"


def test_a_conversation_waiting_for_its_answer():
    row = chat_row([turn("system", "S"), turn("user", "hi")])
    assert [t.role for t in row.turns] == ["system", "user"]
    with pytest.raises(DataError, match="must end with the user"):
        chat_row([turn("user"), turn("assistant")])
