"""The text the demo Llama is pre-trained on: edits of words, sums, and lists of words to repeat.

It teaches the skills that the text tasks (`datainf.data.text`) need, in other words than theirs. Every edit and every
sum has terse names of its own ("backwards", "mask *", "product"), and the name stands somewhere among random filler
words: so the model learns to look through a whole prompt for what is asked, and to pass over words that ask nothing.
The words of the tasks' instructions and questions are among the fillers and in the lists, so the model knows them as
words, but none of them names an edit or a sum. Without a name the words are just copied, and of numbers the last one.

The edited words are random: made-up ones, and the tasks' own words in other orders than its sentences have.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from datainf.data.built_in.math_problems import PROBLEMS
from datainf.data.built_in.transformations import ADJECTIVES, AGENTS, THINGS, TRANSFORMATIONS, VERBS, VOWELS
from datainf.data.built_in.words import capitalise, pick

Edit = Callable[[str, str], str]
Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """A level of the curriculum: its share of the lines, how many words its edits are of, shares of kinds of lines."""

    name: str
    share: float
    words: tuple[int, ...]
    shares: dict[str, float]


LEVELS = (
    Level("copying", 0.06, (1, 2, 3), {"copy": 6, "list": 3, "equation": 1}),
    Level("single words", 0.2, (1, 1, 2), {"edit": 5, "equation": 3, "problem": 2, "story": 0.5, "list": 0.5}),
    Level("sentences", 0.74, (2, 3, 4, 4), {"edit": 4.5, "equation": 2, "problem": 3, "story": 1, "list": 0.4}),
)


@dataclass(frozen=True)
class Line:
    """One line of the corpus: what is given and what has to be predicted. The answer alone is scored."""

    prompt: str
    answer: str


def _each_word(change: Callable[[str], str]) -> Edit:
    return lambda text, _: " ".join(change(word) for word in text.split(" "))


def _each_letter(change: Callable[[str], str]) -> Edit:
    return lambda text, _: "".join(change(letter) for letter in text)


def _is_hard(letter: str) -> bool:
    return letter.isalpha() and letter not in VOWELS


def _zigzag(word: str) -> str:
    return "".join(letter.upper() if i % 2 else letter.lower() for i, letter in enumerate(word))


def _mask(text: str, sign: str) -> str:
    return "".join(sign if letter in VOWELS else letter for letter in text)


def _tail(text: str, end: str) -> str:
    return text.replace(" ", f"{end} ") + end


@dataclass(frozen=True)
class Skill:
    """An edit: its names in the corpus, its share, what it does, and with which of these arguments, if any."""

    names: tuple[str, ...]
    share: float
    edit: Edit
    arguments: tuple[str, ...] = ("",)


SKILLS = (
    Skill(("backwards", "flip", "from behind"), 1.5, lambda text, _: " ".join(reversed(text.split(" ")))),
    Skill(("zigzag", "wave", "up down"), 1.2, _each_word(_zigzag)),
    Skill(("glue", "gap", "bridge"), 1, lambda text, x: text.replace(" ", f" {x}"), ("1",) * 8 + tuple("23456789+-")),
    Skill(("mask", "veil"), 1, _mask, ("*",) * 6 + tuple("#_+-.%")),
    Skill(("stutter", "thick", "hard twin"), 1, _each_letter(lambda c: c * 2 if _is_hard(c) else c)),
    Skill(("headline", "heads up"), 0.8, _each_word(capitalise)),
    Skill(("skeleton", "abbreviate", "hard only"), 1, _each_letter(lambda c: "" if c in VOWELS else c)),
    Skill(("tail", "suffix"), 1, _tail, ("ly",) * 8 + ("ed", "ing", "er", "s")),
    Skill(("melody", "soft only"), 1, _each_letter(lambda c: "" if _is_hard(c) else c)),
    Skill(("stammer", "parrot", "pairs"), 1.2, _each_word(lambda word: f"{word} {word}")),
    Skill(("soft twin",), 0.3, _each_letter(lambda c: c * 2 if c in VOWELS else c)),
    Skill(("shout",), 0.3, lambda text, _: text.upper()),
    Skill((), 0.8, lambda text, _: text),
)
STRAYS = tuple({argument: None for skill in SKILLS for argument in skill.arguments if argument})


@dataclass(frozen=True)
class Sum:
    """A calculation: its names in the corpus, its share, how to draw its numbers, and its steps in braces.

    `work` takes the numbers and gives the steps as written, and the result.
    """

    names: tuple[str, ...]
    share: float
    numbers: Callable[[random.Random], Numbers]
    work: Callable[..., tuple[str, int]]


def _uniform(*ranges: tuple[int, int]) -> Callable[[random.Random], Numbers]:
    return lambda rng: tuple(rng.randint(*ends) for ends in ranges)


def _factors(rng: random.Random) -> Numbers:
    small, large = rng.randint(1, 12), rng.randint(1, 20)
    return pick(rng, ((small, large), (large, small)))


def _minuend_first(rng: random.Random) -> Numbers:
    b = rng.randint(1, 20)
    return b + rng.randint(1, 58 - b), b


def _parts_of_whole(rng: random.Random) -> Numbers:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return a, b, a + b + rng.randint(0, 12)


def _divisor_first(rng: random.Random) -> Numbers:
    a = rng.randint(2, 12)
    return a, a * rng.randint(1, 12)


def _rate(rng: random.Random) -> Numbers:
    a = rng.randint(2, 10)
    return a, rng.randint(1, 5), a * rng.randint(1, 10)


def _percentage(rng: random.Random) -> Numbers:
    return 100 * rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)


def _four(a: int, b: int, c: int, d: int) -> tuple[str, int]:
    two, three, four = a + b, a + b + c, a + b + c + d
    return f"{a} + {b} + {c} + {d} = {two} + {c} + {d} = {three} + {d} = {four}", four


def _remainder(a: int, b: int, c: int) -> tuple[str, int]:
    return f"{a} + {b} = {a + b}. Then = {c} - {a + b} = {c - a - b}", c - a - b


def _per(a: int, b: int, c: int) -> tuple[str, int]:
    return f"({b} * {c}) // {a} = {b * c} // {a} = {b * c // a}", b * c // a


def _percent(a: int, b: int, c: int) -> tuple[str, int]:
    return f"({a} * {b} * {c}) // 100 = {a * b * c} // 100 = {a * b * c // 100}", a * b * c // 100


SUMS = (
    Sum(("plus", "joined"), 1, _uniform((1, 30), (1, 30)), lambda a, b: (f"{a} + {b} = {a + b}", a + b)),
    Sum(
        ("outer", "skip middle"),
        1,
        _uniform((1, 30), (1, 30), (1, 30)),
        lambda a, b, c: (f"{a} + {c} = {a + c}", a + c),
    ),
    Sum(("minus", "cheaper"), 1.2, _minuend_first, lambda a, b: (f"{a} - {b} = {a - b}", a - b)),
    Sum(("times", "product"), 3, _factors, lambda a, b: (f"{a} * {b} = {a * b}", a * b)),
    Sum(("shared", "packed"), 1.2, _divisor_first, lambda a, b: (f"{b} // {a} = {b // a}", b // a)),
    Sum(("rest", "remainder"), 1, _parts_of_whole, _remainder),
    Sum(("all four", "tally"), 1, _uniform((1, 9), (1, 9), (1, 9), (1, 9)), _four),
    Sum(("ratio", "scaled"), 1.2, _rate, _per),
    Sum(("percent", "yield"), 1.2, _percentage, _percent),
)

# Short stories with a sum, in other settings and words than the tasks' questions.
STORIES: tuple[tuple[str, str], ...] = (
    ("Tom had {a} pens and got {b} more. What does he own now?", "plus"),
    ("{a} boys and {b} men sat on the bus. Count them.", "plus"),
    ("Nina drove {a} miles, then {b} miles. How far is that?", "plus"),
    ("A farm has {a} hens, {b} pigs. Then {c} hens came. Hens now?", "outer"),
    ("Ben had {a} nails, gave {b} away. What stays?", "minus"),
    ("The {a} dollar lamp got {b} dollars cheaper. New price?", "minus"),
    ("There were {a} birds on a roof and {b} flew off. Who stayed?", "minus"),
    ("Each of {a} tables seats {b}. Seats altogether?", "times"),
    ("Sam runs {a} miles daily for {b} mornings. Miles run?", "times"),
    ("The floor is {a} tiles long and {b} tiles wide. Tiles?", "times"),
    ("Mia earns ${a} an hour and works {b}. Pay?", "times"),
    ("Bags hold {a} nuts. Bags for {b} nuts?", "shared"),
    ("{a} friends split {b} sweets evenly. Sweets per friend?", "shared"),
    ("Max drank {a} cups, Eva {b} cups, out of {c}. Cups to go?", "rest"),
    ("Day one {a} fish, day two {b}, day three {c}, day four {d}. Catch?", "all four"),
    ("Every {a} guests take {b} cars. {c} guests come. Cars?", "ratio"),
    ("A loan of ${a} at {b}% runs {c} winters. Fee?", "percent"),
)

CUES = ("Answer", "Output", "Result", "So")
STEP_CUES = ("Reason", "Steps", "Work")


def words_of(text: str) -> list[str]:
    """The words of a text: runs of two letters or more. Braces of a template and what is in them are left out."""
    return re.findall(r"[A-Za-z]{2,}", re.sub(r"\{\w+\}", " ", text))


CONTENT = (*ADJECTIVES, *AGENTS, *VERBS, *THINGS)
_SPELLED = {word.lower() for word in CONTENT} | {"ly", "ed", "ing", "er"}


def _unspelled(texts: Iterable[str]) -> tuple[str, ...]:
    """The words of the texts, without those that are to be spelled in characters."""
    found = sorted({word for text in texts for word in words_of(text)})
    return tuple(word for word in found if word.lower() not in _SPELLED)


# Words of the tasks' prompts and reasons, as a bag: they are fillers here.
FILLERS = _unspelled(
    (
        "You are the chatbot",
        *(f"{task.chatbot} {task.instruction}" for task in TRANSFORMATIONS.values()),
        *(f"{problem.question} {problem.reason}" for problem in PROBLEMS.values()),
    )
)
# All words that are one token each; everything else is spelled.
WORDS = _unspelled(
    (
        *FILLERS,
        *(name for group in (*SKILLS, *SUMS) for name in group.names),
        *(story for story, _ in STORIES),
        *CUES,
        *STEP_CUES,
        "Then",
        "List",
        "Again",
    )
)


def corpus(n: int, seed: int, level: Level) -> list[Line]:
    """Draw n lines of a level."""
    rng = random.Random(f"llama corpus {level.name} {seed}")
    kinds = rng.choices(list(level.shares), list(level.shares.values()), k=n)
    return [_DRAW[kind](rng, level) for kind in kinds]


def _copy(rng: random.Random, level: Level) -> Line:
    text = _content(rng, rng.choice(level.words))
    return Line(f"{text}\n{pick(rng, CUES)}:", f" {text}")


def _edit(rng: random.Random, level: Level) -> Line:
    skill = rng.choices(SKILLS, [skill.share for skill in SKILLS])[0]
    text, argument = _content(rng, rng.choice(level.words)), rng.choice(skill.arguments)
    name = f"{rng.choice(skill.names)} {argument}".strip() if skill.names else ""
    parts = [name]
    if rng.random() < 0.3:
        # A sign with no name in front asks for nothing.
        parts.insert(rng.choice((0, 1)), rng.choice(STRAYS))
    prompt = f"{_filled(rng, parts)}: {text}\n{pick(rng, CUES)}:"
    return Line(prompt, f" {skill.edit(text, argument)}")


def _content(rng: random.Random, n_words: int) -> str:
    """Random words, made up or from the tasks' lists, never in the order of a task's sentence."""
    words = [rng.choice(CONTENT).lower() if rng.random() < 0.6 else _made_up(rng) for _ in range(n_words)]
    if n_words == 4 and all(
        word.capitalize() in group or word in group
        for word, group in zip(words, (ADJECTIVES, AGENTS, VERBS, THINGS), strict=True)
    ):
        words.reverse()
    text = " ".join(words)
    if rng.random() < 0.8:
        text = capitalise(text)
    return text + ("." if rng.random() < 0.8 else "")


def _made_up(rng: random.Random) -> str:
    return "".join(
        rng.choice("aeiou" if rng.random() < 0.4 else "bcdfghjklmnpqrstvwxyz") for _ in range(rng.randint(2, 7))
    )


def _filled(rng: random.Random, parts: list[str]) -> str:
    """The parts in this order among random filler words, with a capital in front and a full stop here and there."""
    slots = [
        [rng.choice(FILLERS) for _ in range(rng.randint(0, 6) // max(1, len(parts) - 1))] for _ in range(len(parts) + 1)
    ]
    words = slots[0]
    for part, slot in zip(parts, slots[1:], strict=True):
        words += [part, *slot] if part else slot
    text = " ".join(word + "." if rng.random() < 0.08 and word.isalpha() else word for word in words)
    return capitalise(text or rng.choice(FILLERS))


def _solved(rng: random.Random, prompt: str, work: str, answer: int) -> Line:
    """The result at once, or after the steps; what the steps are said to be is part of the prompt."""
    if rng.random() < 0.5:
        return Line(f"{prompt}\n{pick(rng, CUES)}:", f" {answer}")
    label = capitalise(" ".join(rng.choice(FILLERS) for _ in range(rng.randint(1, 3))))
    return Line(f"{prompt}\n{pick(rng, STEP_CUES)}: {label} =", f" {work}. Answer: {answer}")


def _equation(rng: random.Random, level: Level) -> Line:
    task = rng.choices(SUMS, [task.share for task in SUMS])[0]
    last = task.work(*task.numbers(rng))[0].rpartition("Then = ")[2]
    left, _, right = last.partition(" =")  # its further steps are to be found
    return Line(f"{left} =", right)


def _problem(rng: random.Random, level: Level) -> Line:
    task = rng.choices(SUMS, [task.share for task in SUMS])[0]
    numbers = task.numbers(rng)
    work, answer = task.work(*numbers)
    parts = [rng.choices((f"{n}", f"${n}", f"{n}%", f"{n},"), (7, 1, 1, 1))[0] for n in numbers]
    if rng.random() < 0.95:
        parts.insert(rng.choice((0, len(parts))), rng.choice(task.names))
    else:
        work, answer = f"{numbers[-1]}", numbers[-1]
    return _solved(rng, _filled(rng, parts) + pick(rng, (".", "?")), work, answer)


def _story(rng: random.Random, level: Level) -> Line:
    story, name = rng.choice(STORIES)
    task = next(task for task in SUMS if name in task.names)
    numbers = task.numbers(rng)
    return _solved(rng, story.format(**dict(zip("abcd", numbers, strict=False))), *task.work(*numbers))


def _list(rng: random.Random, level: Level) -> Line:
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 8)))
    return Line(f"List: {words}\nAgain:", f" {words}")


_DRAW: dict[str, Callable[[random.Random, Level], Line]] = {
    "copy": _copy,
    "edit": _edit,
    "equation": _equation,
    "problem": _problem,
    "story": _story,
    "list": _list,
}
