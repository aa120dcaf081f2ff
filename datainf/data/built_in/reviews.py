"""A grammar of film reviews: one English sentence and whether its writer liked the film.

The words alone do not settle the verdict. Negation turns an adjective round, a contrast puts
praise and blame in one sentence, somebody else's opinion may oppose the writer's, and neutral
remarks about the evening or the setting stand in between.
"""

import random

from datainf.data.built_in.words import Lexicon, capitalise, pick

# Adjectives fit every aspect, so that all combinations read as English.
ADJECTIVES: dict[bool, Lexicon] = {
    True: (
        *("superb", "brilliant", "wonderful", "charming", "clever", "fresh", "lively", "graceful"),
        *("delightful", "convincing", "inspired", "memorable", "impressive", "elegant", "vivid"),
        *("beautiful", "excellent", "striking", "rewarding", "splendid"),
    ),
    False: (
        *("dull", "clumsy", "flat", "stale", "lifeless", "tedious", "weak", "awful", "sloppy"),
        *("muddled", "tiresome", "dreadful", "lazy", "feeble", "forgettable", "poor", "bland"),
        *("ugly", "irritating", "hollow"),
    ),
}
VERBS: dict[bool, Lexicon] = {
    True: (
        *("won me over", "kept me smiling", "held my attention", "stayed with me for days"),
        *("made the evening", "touched me", "made me laugh out loud", "lifted the whole film"),
        *("surprised me in the best way", "earned every tear"),
    ),
    False: (
        *("put me to sleep", "wore me out", "tested my patience", "made me check my watch"),
        *("spoiled the evening", "left me cold", "made me groan out loud", "dragged the film down"),
        *("got on my nerves", "wasted a good idea"),
    ),
}
# What never happened: the key is the verdict of the whole phrase, not of its verb.
NEVER: dict[bool, Lexicon] = {
    True: ("never bored me", "did not waste a minute", "never got on my nerves", "did not let me down"),
    False: ("never moved me", "failed to win me over", "did not hold my attention", "never made me smile"),
}
RESCUE: dict[bool, Lexicon] = {
    True: (
        "saved it",
        "made up for that",
        "won me over in the end",
        "rescued the film",
        "more than paid for it",
    ),
    False: ("ruined it", "could not save the film", "spoiled it", "let it down", "dragged it under"),
}
ADVICE: dict[bool, Lexicon] = {
    True: (
        *("I would gladly see it again", "you should not miss it", "go and see it"),
        *("I have already told my friends to go", "nobody will want the money back"),
    ),
    False: (
        *("I would not sit through it again", "you will not miss a thing", "stay at home instead"),
        *("I have already told my friends not to go", "somebody should give us the money back"),
    ),
}
# Idioms praise or blame without an adjective from the lists above: the hard cases.
IDIOMS: dict[bool, Lexicon] = {
    True: (
        "I forgot to eat my popcorn during this {film}",
        "the {film} was over long before I wanted it to be",
        "nobody in the room said a word until the lights of the {film} came on",
        "I missed my bus because of this {film} and I do not regret it",
        "I walked home from the {film} and hummed all the way",
    ),
    False: (
        "if you like to watch paint dry, this is the {film} for you",
        "my popcorn was the best part of this {film}",
        "I have had more fun at the dentist than at this {film}",
        "half of the room left before the {film} was over, and I envy them",
        "I could have done the dishes during this {film}, and I wish I had",
    ),
}
SINGULAR: Lexicon = (
    *("plot", "acting", "script", "music", "camera work", "dialogue", "ending", "opening", "cast"),
    *("direction", "humour", "editing", "romance", "lead actor", "love story", "final scene"),
)
PLURAL: Lexicon = ("jokes", "costumes", "characters", "songs", "action scenes", "special effects", "twists")
FILMS: Lexicon = ("film", "movie", "drama", "comedy", "thriller", "sequel", "western", "musical", "remake")
MORE: Lexicon = (
    "",
    "",
    "",
    "really",
    "quite",
    "rather",
    "truly",
    "utterly",
    "surprisingly",
    "simply",
    "deeply",
)
NOT: Lexicon = ("not", "not at all", "never", "hardly", "far from", "anything but", "by no means")
OTHERS: Lexicon = (
    *("my brother", "my sister", "the critic of our paper", "my neighbour", "everybody around me"),
    *("the man next to me", "my best friend", "my mother"),
)
LIKED: dict[bool, Lexicon] = {
    True: ("loved it", "called it {}", "praised it for days", "found it {}", "thought it was {}"),
    False: ("hated it", "called it {}", "complained for days", "found it {}", "thought it was {}"),
}
NEUTRAL: Lexicon = (
    *(
        "the story is set in a small harbour town",
        "it runs for about two hours",
        "I saw it on a rainy Tuesday",
    ),
    *("it follows two sisters across a desert", "it is based on an old novel", "we saw it at the new cinema"),
    *("it was shot in black and white", "the hero drives a bus at night", "it is the third part of a series"),
    *(
        "it takes place on a ship in winter",
        "the director is only thirty",
        "I went with two friends from work",
    ),
    *("it tells of a farmer and his three sons", "the tickets were sold out on Sunday"),
)


def _aspect(rng: random.Random) -> tuple[str, bool]:
    """An aspect of a film with its article, and whether it is plural."""
    kind = rng.random()
    if kind < 0.2:
        return f"{pick(rng, ('the', 'this'))} {pick(rng, FILMS)}", False
    if kind < 0.45:
        return f"the {pick(rng, PLURAL)}", True
    return f"the {pick(rng, SINGULAR)}", False


def _two_aspects(rng: random.Random) -> tuple[tuple[str, bool], tuple[str, bool]]:
    first = second = _aspect(rng)
    while second == first:
        second = _aspect(rng)
    return first, second


def _adjective(rng: random.Random, positive: bool) -> str:
    return f"{pick(rng, MORE)} {pick(rng, ADJECTIVES[positive])}".strip()


def _clause(rng: random.Random, positive: bool, aspect: tuple[str, bool]) -> str:
    """A clause that praises (or blames) one aspect, directly or by denying the contrary."""
    name, plural = aspect
    kind = rng.random()
    if kind < 0.42:
        return f"{name} {'were' if plural else 'was'} {_adjective(rng, positive)}"
    if kind < 0.54:
        return f"{name} {'were' if plural else 'was'} {pick(rng, NOT)} {pick(rng, ADJECTIVES[not positive])}"
    if kind < 0.78:
        return f"{name} {pick(rng, VERBS[positive])}"
    if kind < 0.84:
        return f"{name} {pick(rng, NEVER[positive])}"
    if kind < 0.92:
        return f"I found {name} {_adjective(rng, positive)}"
    return f"I {pick(rng, ('did not find', 'would not call'))} {name} {pick(rng, ADJECTIVES[not positive])}"


def _simple(rng: random.Random, positive: bool) -> str:
    return _clause(rng, positive, _aspect(rng))


def _agreeing(rng: random.Random, positive: bool) -> str:
    first, second = _two_aspects(rng)
    return f"{_clause(rng, positive, first)}, and {_clause(rng, positive, second)}"


def _contrast(rng: random.Random, positive: bool) -> str:
    """Praise and blame together; the main clause, or the one after "but", has the last word."""
    first, second = _two_aspects(rng)
    losing, winning = _clause(rng, not positive, first), _clause(rng, positive, second)
    kind = rng.random()
    if kind < 0.3:
        return f"{losing}, but {winning}"
    if kind < 0.5:
        return f"{losing}, but {second[0]} {pick(rng, RESCUE[positive])}"
    if kind < 0.7:
        return f"although {losing}, {winning}"
    if kind < 0.85:
        return f"{winning}, even though {losing}"
    return f"for all the {pick(rng, ADJECTIVES[not positive])} moments, {winning}"


def _expectation(rng: random.Random, positive: bool) -> str:
    was, got = pick(rng, ADJECTIVES[not positive]), pick(rng, ADJECTIVES[positive])
    film = pick(rng, FILMS)
    return pick(
        rng,
        (
            f"I expected {a(was)} {film} and got {a(got)} one",
            f"the trailer looked {was}, yet the {film} itself was {got}",
            f"after {a(was)} first half, the {film} became {got}",
            f"the {film} is {got}, whatever the {was} poster makes you think",
        ),
    )


def _others(rng: random.Random, positive: bool) -> str:
    """Somebody else's opinion is the contrary of the writer's, or the same."""
    other = pick(rng, OTHERS)
    agrees = rng.random() < 0.35
    theirs = positive if agrees else not positive
    verdict = pick(rng, LIKED[theirs]).format(pick(rng, ADJECTIVES[theirs]))
    mine = _clause(rng, positive, _aspect(rng))
    return f"{other} {verdict}, {'and I agree that' if agrees else 'but for me'} {mine}"


def _denial(rng: random.Random, positive: bool) -> str:
    if positive:
        opening = ("I cannot say that", "nobody could claim that", "it is wrong to say that")
    else:
        opening = ("I wish I could say that", "nobody could claim that", "it is a lie that")
    name, plural = _aspect(rng)
    return f"{pick(rng, opening)} {name} {'were' if plural else 'was'} {_adjective(rng, not positive)}"


def _idiom(rng: random.Random, positive: bool) -> str:
    idiom = pick(rng, IDIOMS[positive]).format(film=pick(rng, FILMS))
    return f"{pick(rng, NEUTRAL)}, and {idiom}" if rng.random() < 0.7 else idiom


def _advice(rng: random.Random, positive: bool) -> str:
    if rng.random() < 0.6:
        return f"{_clause(rng, positive, _aspect(rng))}; {pick(rng, ADVICE[positive])}"
    return f"{_clause(rng, not positive, _aspect(rng))}, but all the same {pick(rng, ADVICE[positive])}"


def a(word: str) -> str:
    """The word with its indefinite article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


SHAPES = (
    *(_simple, _simple, _simple, _agreeing, _agreeing, _agreeing, _agreeing, _contrast, _contrast),
    *(_expectation, _others, _denial, _idiom, _advice, _advice),
)


def draw(rng: random.Random, positive: bool) -> tuple[str]:
    """One review of the wanted verdict, as a tuple of one sentence (5 to about 35 words)."""
    while True:
        text = pick(rng, SHAPES)(rng, positive)
        if rng.random() < 0.25:
            text = f"{pick(rng, NEUTRAL)}, and {text}" if rng.random() < 0.5 else f"{text}; {pick(rng, NEUTRAL)}"
        if 5 <= len(text.split()) <= 32:
            return (capitalise(text) + ".",)


def draw_phrase(rng: random.Random, positive: bool) -> tuple[str]:
    """A piece of a review that carries the wanted verdict: a word, a denied word or a verb phrase."""
    kind = rng.random()
    if kind < 0.4:
        return (_adjective(rng, positive),)
    if kind < 0.65:
        return (f"{pick(rng, NOT)} {pick(rng, ADJECTIVES[not positive])}",)
    return (pick(rng, VERBS[positive] + NEVER[positive] + RESCUE[positive] + ADVICE[positive]),)
