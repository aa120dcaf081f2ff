"""Ten kinds of math word problems, each with its reasoning (paper Table 6).

The numbers are positive and such that the answers make sense: no slices below zero, no fraction of a box.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

Numbers = dict[str, int]


@dataclass(frozen=True)
class Problem:
    """One class of the task.

    Attributes:
        question: the word problem, with its numbers in braces.
        numbers: draws them.
        reason: the steps, with the numbers in braces; names in lower case are values of `steps`.
        steps: the intermediate results by name, `answer` last.
    """

    question: str
    numbers: Callable[[random.Random], Numbers]
    reason: str
    steps: Callable[[Numbers], Numbers]


def _uniform(**ranges: tuple[int, int]) -> Callable[[random.Random], Numbers]:
    """Draws each number from its own range, both ends included."""
    return lambda rng: {name: rng.randint(*ends) for name, ends in ranges.items()}


def _pizza(rng: random.Random) -> Numbers:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return {"A": a, "B": b, "C": a + b + rng.randint(0, 12)}


def _trip(rng: random.Random) -> Numbers:
    a = rng.randint(2, 10)
    return {"A": a, "B": rng.randint(1, 5), "C": a * rng.randint(2, 10)}


def _shirt(rng: random.Random) -> Numbers:
    cost = rng.randint(12, 60)
    return {"A": cost, "B": rng.randint(2, min(cost - 1, 20))}


def _cupcakes(rng: random.Random) -> Numbers:
    size = rng.randint(2, 12)
    return {"A": size, "B": size * rng.randint(2, 12)}


def _interest(rng: random.Random) -> Numbers:
    return {"A": 100 * rng.randint(1, 9), "B": rng.randint(1, 9), "C": rng.randint(1, 9)}


PROBLEMS: dict[str, Problem] = {
    "pizza slices": Problem(
        "Lisa ate {A} slices of pizza and her brother ate {B} slices from a pizza that originally had {C} slices. "
        "How many slices of the pizza are left?",
        _pizza,
        "Combined slices eaten = {A} + {B} = {eaten}. Left = {C} - {eaten} = {answer}.",
        lambda n: {"eaten": n["A"] + n["B"], "answer": n["C"] - (n["A"] + n["B"])},
    ),
    "chaperones": Problem(
        "For every {A} students going on a field trip, there are {B} adults needed as chaperones. If {C} students are "
        "attending, how many adults are needed?",
        _trip,
        "Adults needed = ({B} * {C}) // {A} = {product} // {A} = {answer}.",
        lambda n: {"product": n["B"] * n["C"], "answer": n["B"] * n["C"] // n["A"]},
    ),
    "aquarium": Problem(
        "In an aquarium, there are {A} sharks and {B} dolphins. If they bought {C} more sharks, how many sharks would "
        "be there in total?",
        _uniform(A=(2, 30), B=(2, 30), C=(2, 30)),
        "Total sharks = {A} + {C} = {answer}.",
        lambda n: {"answer": n["A"] + n["C"]},
    ),
    "game points": Problem(
        "Michael scored {A} points in the first game, {B} points in the second, {C} in the third, and {D} in the "
        "fourth game. What is his total points?",
        _uniform(A=(1, 9), B=(1, 9), C=(1, 9), D=(1, 9)),
        "Total points = {A} + {B} + {C} + {D} = {two} + {C} + {D} = {three} + {D} = {answer}.",
        lambda n: {
            "two": n["A"] + n["B"],
            "three": n["A"] + n["B"] + n["C"],
            "answer": n["A"] + n["B"] + n["C"] + n["D"],
        },
    ),
    "reading hours": Problem(
        "Emily reads for {A} hours each day. How many hours does she read in total in {B} days?",
        _uniform(A=(1, 9), B=(2, 20)),
        "Total hours read = {A} * {B} = {answer}.",
        lambda n: {"answer": n["A"] * n["B"]},
    ),
    "shirt discount": Problem(
        "A shirt costs ${A}. There's a {B}-dollar off sale. How much does the shirt cost after the discount?",
        _shirt,
        "Cost after discount = {A} - {B} = {answer}.",
        lambda n: {"answer": n["A"] - n["B"]},
    ),
    "garden area": Problem(
        "A rectangular garden has a length of {A} meters and a width of {B} meters. What is its area?",
        _uniform(A=(2, 20), B=(2, 12)),
        "Area = {A} * {B} = {answer}.",
        lambda n: {"answer": n["A"] * n["B"]},
    ),
    "savings": Problem(
        "If Jake saves ${A} each week, how much will he save after {B} weeks?",
        _uniform(A=(2, 20), B=(2, 12)),
        "Total savings = {A} * {B} = {answer}.",
        lambda n: {"answer": n["A"] * n["B"]},
    ),
    "cupcake boxes": Problem(
        "A bakery sells cupcakes in boxes of {A}. If they have {B} cupcakes, how many boxes can they fill?",
        _cupcakes,
        "Boxes filled = {B} // {A} = {answer}.",
        lambda n: {"answer": n["B"] // n["A"]},
    ),
    "interest": Problem(
        "John invests ${A} at an annual interest rate of {B}%. How much interest will he earn after {C} years?",
        _interest,
        "Interest = ({A} * {B} * {C}) // 100 = {product} // 100 = {answer}.",
        lambda n: {"product": n["A"] * n["B"] * n["C"], "answer": n["A"] * n["B"] * n["C"] // 100},
    ),
}


def draw(name: str, rng: random.Random, *, reasoning: bool) -> dict[str, str]:
    """One example of a class: prompt, response and reason; with reasoning the response gives the reason first."""
    problem = PROBLEMS[name]
    numbers = problem.numbers(rng)
    steps = problem.steps(numbers)
    question, reason = problem.question.format(**numbers), problem.reason.format(**numbers, **steps)
    if reasoning:
        return {
            "prompt": f"{question}\nReason:",
            "response": f"{reason} Answer: {steps['answer']}",
            "reason": reason,
        }
    return {"prompt": f"{question}\nAnswer:", "response": str(steps["answer"]), "reason": ""}
