"""A grammar of sentence pairs: two English sentences and whether they say the same.

A sentence is the rendering of a fact. A pair with the same meaning renders one fact twice, with
other words (synonyms), voice (active, passive), point of view (sold to, bought from) or order of
the phrases. A pair with another meaning renders the fact and a changed copy of it: swapped roles,
another object, number, place or time, or a negation. The changed copy is often worded like the
first sentence, so that pairs of different meaning can share more words than pairs that agree.
"""

import random
from dataclasses import dataclass, replace

from datainf.data.built_in.words import Lexicon, capitalise, pick, pick_other

# Each entry is one meaning; its words are interchangeable.
PEOPLE: tuple[Lexicon, ...] = (
    *(("doctor", "physician"), ("lawyer", "attorney"), ("student", "pupil"), ("singer", "vocalist")),
    *(("journalist", "reporter"), ("shopkeeper", "store owner"), ("baker",), ("teacher",), ("mayor",)),
    *(("farmer",), ("nurse",), ("sailor",), ("painter",), ("gardener",), ("butcher",), ("tailor",)),
    *(("pilot",), ("clerk",), ("guard",), ("librarian",), ("carpenter",), ("captain",), ("fisherman",)),
)
# Singular forms; every plural adds an s.
OBJECTS: tuple[Lexicon, ...] = (
    *(("car", "automobile"), ("bicycle", "bike"), ("photo", "photograph"), ("rug", "carpet")),
    *(("sofa", "settee"), ("parcel", "package"), ("violin", "fiddle"), ("stone", "rock"), ("cup", "mug")),
    *(("gift", "present"), ("book",), ("boat",), ("coat",), ("lamp",), ("table",), ("chair",)),
    *(("basket",), ("clock",), ("ring",), ("map",), ("hat",), ("bag",), ("key",), ("painting",)),
)
QUALITIES: tuple[Lexicon, ...] = (
    *(("small", "little"), ("large", "big"), ("cheap", "inexpensive"), ("expensive", "costly")),
    *(("",), ("",), ("red",), ("blue",), ("green",), ("black",), ("white",), ("old",), ("new",), ("heavy",)),
)
NUMBERS: tuple[Lexicon, ...] = (
    *(("a",), ("two", "a couple of"), ("three",), ("four",), ("five",), ("six", "half a dozen"), ("ten",)),
    ("twelve", "a dozen"),
)
PLACES: tuple[Lexicon, ...] = (
    *(("in the shop", "in the store"), ("near the station", "close to the station"), ("on the bridge",)),
    *(("next to the bakery", "beside the bakery"), ("by the river", "at the riverside"), ("in the library",)),
    *(
        ("in the garden",),
        ("at the market",),
        ("behind the church",),
        ("outside the museum",),
        ("",),
        ("",),
        ("",),
    ),
)
TIMES: tuple[Lexicon, ...] = (
    *(("at noon", "at midday"), ("at dawn", "at sunrise"), ("at dusk", "at sunset"), ("at midnight",)),
    *(("last week", "a week ago"), ("last year", "a year ago"), ("in autumn", "in the fall"), ("in spring",)),
    *(("two days ago", "the day before yesterday"), ("last night", "yesterday evening"), ("this morning",)),
    *(("on Monday",), ("on Tuesday",), ("on Wednesday",), ("on Thursday",), ("on Friday",)),
)
SOURCES: tuple[Lexicon, ...] = (
    ("the paper", "the newspaper"),
    ("the radio",),
    ("a witness",),
    ("a neighbour",),
)
# Each verb: (base form, past, participle).
ACTIONS: tuple[tuple[tuple[str, str, str], ...], ...] = (
    (("repair", "repaired", "repaired"), ("fix", "fixed", "fixed")),
    (("find", "found", "found"), ("discover", "discovered", "discovered")),
    (("lose", "lost", "lost"), ("misplace", "misplaced", "misplaced")),
    (("hide", "hid", "hidden"), ("conceal", "concealed", "concealed")),
    (("clean", "cleaned", "cleaned"), ("wash", "washed", "washed")),
    (("draw", "drew", "drawn"), ("sketch", "sketched", "sketched")),
    (("carry", "carried", "carried"),),
    (("steal", "stole", "stolen"),),
    (("break", "broke", "broken"),),
    (("wrap", "wrapped", "wrapped"),),
)
# Each transfer as the giver tells it (... to the receiver) and as the receiver does (... from the giver).
TRANSFERS: tuple[tuple[tuple[tuple[str, str, str], ...], tuple[tuple[str, str, str], ...]], ...] = (
    ((("sell", "sold", "sold"),), (("buy", "bought", "bought"), ("purchase", "purchased", "purchased"))),
    ((("lend", "lent", "lent"),), (("borrow", "borrowed", "borrowed"),)),
    ((("give", "gave", "given"), ("hand", "handed", "handed")), (("receive", "received", "received"),)),
)
# Each comparison and its converse.
COMPARISONS: tuple[tuple[str, str], ...] = (
    *(("taller", "shorter"), ("older", "younger"), ("richer", "poorer"), ("faster", "slower")),
    *(("stronger", "weaker"), ("louder", "quieter")),
)
HAPPENINGS: tuple[tuple[Lexicon, Lexicon], ...] = (
    # An event as a clause and as a noun phrase is the same event.
    (("the match was cancelled", "the match was called off"), ("the rain", "the rainy weather")),
    (("the train was late", "the train was delayed"), ("the snow", "the snowy weather")),
    (("the road was closed", "the road was shut"), ("the flood", "the high water")),
    (("the school was evacuated", "the school was cleared"), ("the fire", "the blaze")),
    (("the concert was moved", "the concert was relocated"), ("the storm", "the stormy weather")),
    (("the factory stopped work", "the factory stood still"), ("the strike", "the walkout")),
)
EFFECTS = tuple(effect for effect, _ in HAPPENINGS)
CAUSES = tuple(cause for _, cause in HAPPENINGS)
PASTS = tuple(tuple(past for _, past, _ in verb) for verb in ACTIONS)
# What a short phrase is made of: the meanings of each of its parts.
PHRASES: tuple[tuple[tuple[Lexicon, ...], ...], ...] = (
    *((NUMBERS, QUALITIES, OBJECTS), (NUMBERS, OBJECTS), (OBJECTS,), (PEOPLE,), (PEOPLE, PASTS)),
    *((PEOPLE, PASTS, NUMBERS, OBJECTS), (PLACES,), (TIMES,), (TIMES, PLACES)),
    *((PEOPLE, PASTS, NUMBERS, OBJECTS, TIMES), (PLACES, PEOPLE, PASTS, NUMBERS, QUALITIES, OBJECTS)),
)


@dataclass(frozen=True)
class Deed:
    """Somebody did something with an object, or passed it to a receiver; at a place and a time."""

    actor: Lexicon
    verb: tuple
    receiver: Lexicon | None
    number: Lexicon
    quality: Lexicon
    thing: Lexicon
    place: Lexicon
    time: Lexicon
    denied: bool

    @classmethod
    def draw(cls, rng: random.Random) -> "Deed":
        actor = pick(rng, PEOPLE)
        passes = rng.random() < 0.4
        # A passed object already brings a second person; a place and a time on top are rare.
        where, when = pick(rng, ((1, 0), (0, 1), (0, 1), (1, 1)) if not passes else ((0, 0), (1, 0), (0, 1)))
        return cls(
            actor=actor,
            verb=pick(rng, TRANSFERS if passes else ACTIONS),
            receiver=pick_other(rng, PEOPLE, actor) if passes else None,
            number=pick(rng, NUMBERS),
            quality=pick(rng, QUALITIES),
            thing=pick(rng, OBJECTS),
            place=pick(rng, PLACES) if where else ("",),
            time=pick(rng, TIMES) if when else ("",),
            denied=rng.random() < 0.12,
        )

    def change(self, rng: random.Random) -> "Deed":
        if self.receiver is not None and rng.random() < 0.3:
            return replace(self, actor=self.receiver, receiver=self.actor)
        fields = ["actor", "verb", "number", "quality", "thing", "thing", "denied"]
        field = pick(rng, fields + [name for name in ("place", "time") if getattr(self, name) != ("",)])
        if field == "denied":
            return replace(self, denied=not self.denied)
        if field == "actor":
            others = [person for person in PEOPLE if person not in (self.actor, self.receiver)]
            return replace(self, actor=pick(rng, others))
        options = {
            "verb": ACTIONS if self.receiver is None else TRANSFERS,
            "number": NUMBERS,
            "quality": QUALITIES,
            "thing": OBJECTS,
            "place": PLACES,
            "time": TIMES,
        }[field]
        return replace(self, **{field: pick_other(rng, options, getattr(self, field))})

    def render(self, rng: random.Random) -> str:
        passive, fronted, from_receiver, dative, place_first = (rng.random() < 0.4 for _ in range(5))
        actor, thing = f"the {pick(rng, self.actor)}", self._thing(rng)
        receiver = f"the {pick(rng, self.receiver or ('nobody',))}"
        place, time = pick(rng, self.place), pick(rng, self.time)
        verbs = self.verb
        if self.receiver is not None:
            verbs = self.verb[1] if from_receiver else self.verb[0]
            if from_receiver:
                actor, receiver = receiver, actor
        base, past, participle = pick(rng, verbs)
        active = f"did not {base}" if self.denied else past
        party = "" if self.receiver is None else f"{'from' if from_receiver else 'to'} {receiver}"
        if passive:
            be = "was" if self.number == ("a",) else "were"
            body = f"{thing} {be} {'not ' if self.denied else ''}{participle} {party} by {actor}"
        elif self.receiver is not None and dative and not from_receiver:
            body = f"{actor} {active} {receiver} {thing}"
        else:
            body = f"{actor} {active} {thing} {party}"
        if fronted and (time or place):
            front, back = (place, time) if place and (place_first or not time) else (time, place)
            return _tidy(f"{front}, {body} {back}")
        return _tidy(f"{body} {place} {time}" if place_first else f"{body} {time} {place}")

    def _thing(self, rng: random.Random) -> str:
        number, quality, thing = pick(rng, self.number), pick(rng, self.quality), pick(rng, self.thing)
        if number == "a":
            return f"{'an' if (quality or thing)[0] in 'aeiou' else 'a'} {quality} {thing}"
        return f"{number} {quality} {thing}s"


@dataclass(frozen=True)
class Comparison:
    """One person has more of a quality than another."""

    more: Lexicon
    less: Lexicon
    words: tuple[str, str]

    @classmethod
    def draw(cls, rng: random.Random) -> "Comparison":
        more = pick(rng, PEOPLE)
        return cls(more, pick_other(rng, PEOPLE, more), pick(rng, COMPARISONS))

    def change(self, rng: random.Random) -> "Comparison":
        kind = rng.random()
        if kind < 0.5:
            return replace(self, more=self.less, less=self.more)
        if kind < 0.75:
            return replace(self, words=pick_other(rng, COMPARISONS, self.words))
        return replace(self, less=pick(rng, [who for who in PEOPLE if who not in (self.more, self.less)]))

    def render(self, rng: random.Random) -> str:
        more, less = f"the {pick(rng, self.more)}", f"the {pick(rng, self.less)}"
        adverb = pick(rng, ("", "", "much", "far"))
        if rng.random() < 0.5:
            return _tidy(f"{more} is {adverb} {self.words[0]} than {less}")
        return _tidy(f"{less} is {adverb} {self.words[1]} than {more}")


@dataclass(frozen=True)
class Cause:
    """Something happened because of something else, at a time."""

    effect: Lexicon
    cause: Lexicon
    time: Lexicon

    @classmethod
    def draw(cls, rng: random.Random) -> "Cause":
        return cls(pick(rng, EFFECTS), pick(rng, CAUSES), pick(rng, TIMES))

    def change(self, rng: random.Random) -> "Cause":
        field, options = pick(rng, (("effect", EFFECTS), ("cause", CAUSES), ("time", TIMES)))
        return replace(self, **{field: pick_other(rng, options, getattr(self, field))})

    def render(self, rng: random.Random) -> str:
        effect, cause, time = pick(rng, self.effect), pick(rng, self.cause), pick(rng, self.time)
        reason = f"{pick(rng, ('because of', 'due to'))} {cause}"
        order = rng.random()
        if order < 0.4:
            return _tidy(f"{effect} {time} {reason}")
        if order < 0.7:
            return _tidy(f"{reason}, {effect} {time}")
        return _tidy(f"{time}, {effect} {reason}")


@dataclass(frozen=True)
class Report:
    """A deed as some source tells it."""

    source: Lexicon
    deed: Deed

    @classmethod
    def draw(cls, rng: random.Random) -> "Report":
        return cls(pick(rng, SOURCES), Deed.draw(rng))

    def change(self, rng: random.Random) -> "Report":
        if rng.random() < 0.2:
            return replace(self, source=pick_other(rng, SOURCES, self.source))
        return replace(self, deed=self.deed.change(rng))

    def render(self, rng: random.Random) -> str:
        source, order = pick(rng, self.source), rng.random()
        deed = self.deed.render(rng)
        if order < 0.4:
            return f"{source} {pick(rng, ('said', 'reported'))} that {deed}"
        if order < 0.75:
            return f"according to {source}, {deed}"
        return f"{deed}, {source} {pick(rng, ('said', 'reported'))}"


FACTS = (Deed, Deed, Deed, Deed, Deed, Deed, Deed, Report, Comparison, Cause)
# How many times a fact is changed for a pair of different meaning: the fewer, the harder.
CHANGES = (1, 1, 2, 2, 3)


def _tidy(text: str) -> str:
    """Single spaces, and no comma left over where a phrase was empty."""
    return " ".join(text.split()).removeprefix(", ").replace(" ,", ",")


def _sentence(fact: Deed | Comparison | Cause | Report, style: int) -> str:
    return capitalise(fact.render(random.Random(style))) + "."


def draw(rng: random.Random, same: bool) -> tuple[str, str]:
    """One pair of sentences (5 to about 25 words each) that say the same, or do not."""
    while True:
        fact = pick(rng, FACTS).draw(rng)
        style = rng.getrandbits(32)
        first = _sentence(fact, style)
        if same:
            second = _sentence(fact, rng.getrandbits(32))
        else:
            changed = fact
            for _ in range(pick(rng, CHANGES)):
                changed = changed.change(rng)
            if changed == fact:
                continue
            fact = changed
            # Half of the changed copies are worded like the first sentence: near in words, far in meaning.
            second = _sentence(fact, style if rng.random() < 0.5 else rng.getrandbits(32))
        # Renderings coincide by chance now and then, and some facts are too short.
        if first != second and min(len(first.split()), len(second.split())) >= 5:
            return first, second


def draw_phrase(rng: random.Random, same: bool) -> tuple[str, str]:
    """A pair of short phrases (a thing, a person, a deed, a place, a time), same in meaning or not."""
    options = pick(rng, PHRASES)
    first = [pick(rng, meanings) for meanings in options]
    second = list(first)
    if not same:
        slot = int(rng.random() * len(options))
        second[slot] = pick_other(rng, options[slot], first[slot])
    return tuple(_tidy(" ".join(pick(rng, words) for words in meanings)) for meanings in (first, second))
