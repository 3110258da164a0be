"""Generated dialogues whose answers have a quality, a length and an agreement of their own, scored by rule.

    prompt  =  "Human: I think that" topic belief qualifier question "Assistant:"
    answer  =  stance  body  stance
    body    =  6 × ("a" adjective noun), 0 to 40 filler words, shuffled

Of each answer and independently: the share of good adjectives p ~ U(0, 1), each adjective good with probability p; the
number of fillers is uniform; the leaning t ~ U(0, 1), each stance agrees with probability t/2, disagrees with
(1 − t)/2, else does neither. All stances have three words, so that the length says nothing of them.

    quality    (good − bad adjectives) / 6        uniform on its 7 values
    agreement  (agreeing − disagreeing stances) / 2
    length     words of the answer, 24 to 64

The better answer is preferred, a coin decides where they are equal: length and agreement say nothing of the preference.
"""

import random
from dataclasses import dataclass

TOPICS = (
    *("city parks", "night trains", "small schools", "old bridges", "garden walls", "long walks", "cold soups"),
    *("paper maps", "wool coats", "shared kitchens", "early meetings", "wooden boats", "public clocks", "open windows"),
    *("short novels", "herb gardens", "brick houses", "mountain huts", "street markets", "card games"),
)
BELIEFS = (
    *("are better than people say", "are a waste of time", "deserve more money", "should be left alone"),
    *("are worth the trouble", "have had their day", "make life easier", "cause more harm than good"),
)
QUALIFIERS = (
    *("these days", "in most places", "for young families", "in the winter", "as a rule", "on the whole"),
    *("where I live", "in my experience", "at my age", "for the next ten years"),
)
QUESTIONS = (
    *("What would you advise?", "How should I go about it?", "Where do I start?", "What is the next step?"),
    *("What should I read?", "Whom should I ask?", "How do I explain it?", "What did others do?"),
    *("How much does it take?", "When is the best moment?", "What could go wrong?", "What do I need?"),
)
GOOD = (
    *("accurate", "clear", "careful", "specific", "practical", "honest", "complete", "tested", "precise", "relevant"),
    *("concrete", "balanced", "verified", "useful", "thorough", "exact"),
)
BAD = (
    *("vague", "sloppy", "wrong", "careless", "outdated", "confused", "useless", "partial", "misleading", "dubious"),
    *("hasty", "garbled", "untested", "muddled", "shallow", "broken"),
)
NOUNS = ("plan", "list", "step", "source", "example", "answer", "measure", "reason", "summary", "estimate")
FILLERS = (
    *("well", "so", "then", "now", "also", "perhaps", "again", "here", "there", "still", "meanwhile", "anyway"),
    *("today", "later", "first", "next", "besides", "somehow", "often", "sometimes", "indeed", "maybe", "around"),
    *("along", "together", "further", "twice", "almost", "rather", "usually"),
)
AGREEING = ("you are right", "I fully agree", "as you said", "that is true", "good for you")
DISAGREEING = ("you are mistaken", "I must disagree", "despite your view", "that is false", "not at all")
NEITHER = ("let us see", "to begin with", "in other words", "one could say", "at this point")

SLOTS = 6  # adjectives of an answer
MOST_FILLERS = 40
LARGEST = len(TOPICS) * len(BELIEFS) * len(QUALIFIERS) * len(QUESTIONS)  # prompts, each different


@dataclass(frozen=True)
class Dialogue:
    """A prompt, two answers, and which of them (0 or 1) is preferred."""

    prompt: str
    answers: tuple[str, str]
    preferred: int


def quality(answer: str) -> float:
    """In [−1, 1]."""
    words = answer.split()
    return (sum(word in GOOD for word in words) - sum(word in BAD for word in words)) / SLOTS


def agreement(answer: str) -> float:
    """In [−1, 1]: what the first three words and the last three say."""
    words = answer.split()
    stances = (" ".join(words[:3]), " ".join(words[-3:]))
    return sum((stance in AGREEING) - (stance in DISAGREEING) for stance in stances) / 2


def _stance(rng: random.Random, leaning: float) -> str:
    kind = rng.choices((AGREEING, DISAGREEING, NEITHER), weights=(leaning / 2, (1 - leaning) / 2, 0.5))[0]
    return rng.choice(kind)


def _answer(rng: random.Random) -> str:
    share, leaning = rng.random(), rng.random()
    body = [f"a {rng.choice(GOOD if rng.random() < share else BAD)} {rng.choice(NOUNS)}" for _ in range(SLOTS)]
    body += rng.choices(FILLERS, k=rng.randint(0, MOST_FILLERS))
    rng.shuffle(body)
    return " ".join([_stance(rng, leaning), *body, _stance(rng, leaning)])


def generate(n: int, seed: int) -> list[Dialogue]:
    """n dialogues with different prompts; the first k of n are those of k. ValueError for n above `LARGEST`."""
    if not 0 <= n <= LARGEST:
        raise ValueError(f"n must be between 0 and {LARGEST}, got {n}")
    rng = random.Random(seed)
    prompts: set[str] = set()
    dialogues: list[Dialogue] = []
    while len(dialogues) < n:
        topic, belief, qualifier, question = (rng.choice(part) for part in (TOPICS, BELIEFS, QUALIFIERS, QUESTIONS))
        prompt = f"\n\nHuman: I think that {topic} {belief} {qualifier}. {question}\n\nAssistant:"
        if prompt in prompts:
            continue
        prompts.add(prompt)
        first, second = _answer(rng), _answer(rng)
        difference = quality(second) - quality(first)
        preferred = int(difference > 0) if difference else rng.randrange(2)
        dialogues.append(Dialogue(prompt, (first, second), preferred))
    return dialogues
