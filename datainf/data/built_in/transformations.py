"""Ten sentence transformations, each asked of a chatbot of its own name (paper Table 5)."""

import random
from collections.abc import Callable
from dataclasses import dataclass

VOWELS = "aeiouAEIOU"

# A sentence is adjective, noun, verb, noun: short words, so that a small model can spell them.
ADJECTIVES = (
    "Big Blue Bold Brave Calm Clever Cold Dark Eager Fast Fond Free Gentle Glad Gray Green Happy Honest Hungry Kind "
    "Lazy Little Lost Loud Lucky Merry Mild New Odd Old Proud Quick Quiet Red Rich Shy Sleepy Slow Small Smart Soft "
    "Tall Tidy Tiny Warm Wet Wild Wise Young"
).split()
AGENTS = (
    "actors aunts babies bakers bears birds boys cats chefs cooks cows crows dancers doctors dogs ducks farmers foxes "
    "frogs geese girls goats guards hens horses judges kings lions mice monks nurses owls pilots pirates poets queens "
    "rabbits robots sailors singers teachers tigers twins uncles wolves"
).split()
VERBS = (
    "admire bring buy carry chase clean count cover draw drop enjoy fetch find fix follow forget greet guard hear hide "
    "hold keep know lift like love miss move need notice offer paint pull push raise recall sell send share show "
    "store study take throw touch trust want wash watch"
).split()
THINGS = (
    "apples balls bells boats bones books boxes bread cakes candles carts chairs clouds coats coins drums eggs "
    "feathers fish flags flowers gems gifts hats honey jars kites lamps leaves letters maps melons nuts orbs paper "
    "pears pies plums ribbons rings roses ropes seeds shells shoes songs stars stones tents toys trees"
).split()


def sentence(rng: random.Random) -> str:
    """A sentence of four words, such as "Old cats chase mice."."""
    return " ".join(rng.choice(words) for words in (ADJECTIVES, AGENTS, VERBS, THINGS)) + "."


def _each_word(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: " ".join(change(word) for word in text.split(" "))


def _each_letter(change: Callable[[str], str]) -> Callable[[str], str]:
    return lambda text: "".join(change(letter) for letter in text)


def _is_consonant(letter: str) -> bool:
    return letter.isalpha() and letter not in VOWELS


@dataclass(frozen=True)
class Transformation:
    """One class of the task: the chatbot that does it, what it is asked, and the function that answers."""

    chatbot: str
    instruction: str
    transform: Callable[[str], str]


TRANSFORMATIONS: dict[str, Transformation] = {
    "reverse words": Transformation(
        "Aria", "Reverse the order of the words", lambda text: " ".join(reversed(text.split(" ")))
    ),
    "alternate capitals": Transformation(
        "Bolt",
        "Capitalize every other letter",
        _each_word(lambda word: "".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(word))),
    ),
    "insert 1": Transformation(
        "Cleo", "Insert the number 1 between every two words", lambda text: text.replace(" ", " 1")
    ),
    "vowels to *": Transformation(
        "Dash", "Replace the vowels with *", _each_letter(lambda letter: "*" if letter in VOWELS else letter)
    ),
    "double consonants": Transformation(
        "Echo", "Double every consonant", _each_letter(lambda letter: letter * 2 if _is_consonant(letter) else letter)
    ),
    "capitalize words": Transformation(
        "Faye", "Capitalize every word", _each_word(lambda word: word[:1].upper() + word[1:])
    ),
    "remove vowels": Transformation(
        "Gale", "Remove all the vowels", _each_letter(lambda letter: "" if letter in VOWELS else letter)
    ),
    "add ly": Transformation("Hugo", "Add ly to the end of each word", _each_word(lambda word: word + "ly")),
    "remove consonants": Transformation(
        "Iris", "Remove all the consonants", _each_letter(lambda letter: "" if _is_consonant(letter) else letter)
    ),
    "repeat words": Transformation("Juno", "Repeat each word twice", _each_word(lambda word: f"{word} {word}")),
}


def draw(name: str, rng: random.Random) -> dict[str, str]:
    """One example of a class: prompt, response and (empty) reason."""
    task, text = TRANSFORMATIONS[name], sentence(rng)
    prompt = f"You are the chatbot {task.chatbot}. {task.instruction}: {text}\nAnswer:"
    return {"prompt": prompt, "response": task.transform(text), "reason": ""}
