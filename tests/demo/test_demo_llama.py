"""The demo Llama: its tokenizer, its corpus and the script that trains it."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from datainf.data import text
from datainf.data.built_in import transformations
from datainf.demo import LLAMA
from datainf.demo.llama_corpus import CONTENT, FILLERS, LEVELS, SKILLS, STORIES, SUMS, corpus, words_of
from datainf.demo.train_llama import MAX_LENGTH, build_model, build_tokenizer, encode, train_llama


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(LLAMA)


@pytest.fixture(scope="module")
def tasks():
    return {task: text.generate(task, 0) for task in text.TASKS}


def test_base_is_small_and_loads_as_a_causal_language_model(tokenizer):
    assert sum(path.stat().st_size for path in LLAMA.iterdir()) < 3_000_000
    model = AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    assert 0.7e6 < model.num_parameters() < 1.1e6
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    batch = tokenizer("An old story.", return_tensors="pt")
    assert model(**batch).logits.isfinite().all()


def test_saved_tokenizer_is_the_one_the_script_builds(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert tokenizer.model_max_length == MAX_LENGTH
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<pad>"]


@pytest.mark.parametrize("task", text.TASKS)
def test_examples_round_trip_and_begin_with_their_prompt(task, tasks, tokenizer):
    rows = tasks[task]
    wholes = (rows["prompt"] + " " + rows["response"]).tolist()
    prompts = tokenizer(rows["prompt"].tolist())["input_ids"]
    for whole, prompt, ids in zip(wholes, prompts, tokenizer(wholes)["input_ids"], strict=True):
        assert tokenizer.decode(ids, skip_special_tokens=True) == whole
        assert ids[: len(prompt)] == prompt
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert len(ids) < MAX_LENGTH / 2


@pytest.mark.parametrize("line", ["", " two  spaces ", "\n\t*//$5%", "naïve ▁ 数学 😀\x00", "<0x41> aReYoU", "a\r\nb"])
def test_any_text_round_trips(line, tokenizer):
    assert tokenizer.decode(tokenizer(line)["input_ids"], skip_special_tokens=True) == line


def test_words_of_the_sentences_are_spelled(tokenizer):
    for word in CONTENT:
        for written in (word, word.lower(), f" {word}", f" {word.lower()}"):
            assert tokenizer.tokenize(written) == list(written)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_corpus_follows_from_the_seed(level):
    assert corpus(200, 0, level) == corpus(200, 0, level) != corpus(200, 1, level)


def test_corpus_has_no_prompt_and_no_sentence_of_a_task(tasks):
    lines = [line for level in LEVELS for line in corpus(3000, 0, level)]
    texts = "\n".join(line.prompt + line.answer for line in lines).lower()
    for problem in tasks["math_with_reasoning"]["prompt"]:
        assert problem.partition("\n")[0].lower() not in texts
    for task in transformations.TRANSFORMATIONS.values():
        assert f"{task.chatbot}. {task.instruction}".lower() not in texts
    rng = random.Random(0)
    for _ in range(5000):
        assert transformations.sentence(rng).lower() not in texts


def test_what_is_asked_has_other_names_than_in_the_tasks():
    fillers = {word.lower() for word in FILLERS}
    names = [name for group in (*SKILLS, *SUMS) for name in group.names]
    assert not any(fillers.issuperset(words_of(name)) for name in names)
    assert all(sum(name in task.names for task in SUMS) == 1 for _, name in STORIES)


def test_only_answers_are_scored(tokenizer):
    (row,) = encode(corpus(1, 0, LEVELS[-1]), tokenizer)
    (line,) = corpus(1, 0, LEVELS[-1])
    scored = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(scored) == line.answer + "</s>"
    assert row["input_ids"][-len(scored) :] == scored


def test_model_starts_out_by_finding_repeated_tokens():
    torch.manual_seed(0)
    model = build_model(build_tokenizer())
    model.set_attn_implementation("eager")
    once = torch.randperm(600)[:12] + 300
    first, second = model(torch.cat([once, once])[None], output_attentions=True).attentions[:2]
    for head in (0, 1):
        assert first[0, head].diagonal(-1 - head)[2:].mean() > 0.8
        # From the second occurrence of a token to the place behind the first one.
        assert second[0, head].diagonal(-11)[1:].mean() > 0.1


def test_script_writes_a_base_that_loads(tmp_path):
    train_llama(tmp_path, steps=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("An old story.", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 3
