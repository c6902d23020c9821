"""Stories to tell, to go on with, and to be asked about."""

from __future__ import annotations

import re
from random import Random

from dsv4.chat.events import Completion
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.phrasing import ask, asked, listed, plain, says, short
from dsv4.check.tasks.story_grammar import Question, Story, sentence_case, tell

__all__ = ["FAMILIES", "Story", "tell"]

ASKED_SHORTEST = 40  # words of a story that a model tells
SENTENCE = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]")) (?="?[A-Z])')

# --- telling one --------------------------------------------------------------------------------------------------

# What a story can be asked for: words for the request, and the slots that the answer must mention.
TOPICS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ()),  # just a story
    ("about {hero}", ("hero",)),
    ("about a {who} named {hero}", ("who", "hero")),
    ("about {hero} and {friend}", ("hero", "friend")),
    ("about a {thing}", ("thing",)),
    ("about {hero} and a {thing}", ("hero", "thing")),
    ("about a {colour} {thing}", ("colour", "thing")),
    ("about a {who} and a {thing}", ("who", "thing")),
    ("that happens {at}", ("place",)),
    ("about {hero} {at}", ("hero", "place")),
    ("with {hero}, {friend} and a {thing} in it", ("hero", "friend", "thing")),
    ("with the words {thing}, {place} and {feeling}", ("thing", "place", "feeling")),
    ("with the words {hero} and {feeling}", ("hero", "feeling")),
)
ANY = "any story"  # the key of all requests that say no more: on the taught side, as they are one question
REQUESTS = (
    "Tell me a story {topic}.",
    "Tell me a short story {topic}.",
    "Write a short story {topic}.",
    "Write a story {topic}.",
    "Can you tell a story {topic}?",
    "Could you write a little story {topic}?",
    "I would like a story {topic}.",
    "I want to hear a story {topic}.",
    "Make up a story {topic}.",
    "Give me a short story {topic}.",
    "Please tell a bedtime story {topic}.",
    "My child wants a story {topic}. Can you tell one?",
    "Do you know a story {topic}?",
    "Invent a small tale {topic}.",
    "A story {topic}, please.",
    "Story time! Tell one {topic}.",
    "Tell me another story {topic}.",
    "A short story {topic}",
    "Please write a story {topic}.",
    "Let me hear a story {topic}.",
)
PLANS = (
    "A short story is wanted. It must mention {words}. It begins with {hero} and ends well.",
    "The story needs {words}. {hero} is the hero, and {friend} comes along.",
    "I need {words} in it. First I say who {hero} is, then something happens, then a good end.",
    "The user wants a story with {words}.",
)


def make_story(random: Random, thinking: bool, size: int) -> Item:
    """A story asked for by some of the words in it."""
    story = tell(random)
    slots = {name: value for name, value in story._asdict().items() if isinstance(value, str)}
    topics = [topic for topic in TOPICS if says(story.text, *(slots[slot] for slot in topic[1]))]
    topic, wanted = random.choice(topics)
    words = tuple(slots[slot] for slot in wanted)
    template = random.choice(REQUESTS) if topic else random.choice(REQUESTS).replace(" {topic}", "")
    request = ask(template, random, topic=sentence_case(" " + topic.format(**slots)).strip())
    plan = random.choice(PLANS) if topic else "The user wants a story. I tell one about {hero} and {friend}."
    reasoning = plan.format(words=listed(words or ("",)), hero=story.hero, friend=story.friend) if thinking else ""
    key = "|".join(words) or ANY
    return Item("story", key, asked(request, random), story.text, reasoning, thinking=thinking, wanted=words)


def judge_story(item: Item, completion: Completion) -> bool:
    """The words asked for, 40 words or more, no sentence again and again, and an end."""
    return plain(completion) and says(completion.content, *item.wanted) and is_story(completion.content)


def is_story(text: str, shortest: int = ASKED_SHORTEST) -> bool:
    """Long enough, at most one sentence twice, and not broken off."""
    sentences = SENTENCE.split(text.strip())
    return (
        len(text.split()) >= shortest
        and len(sentences) - len(set(sentences)) <= 1
        and text.rstrip().endswith((".", "!", "?", '"', "”"))
    )


# --- going on with one --------------------------------------------------------------------------------------------

CONTINUE = (
    "Go on with this story:\n\n{start}",
    "Continue the story.\n\n{start}",
    "How does this story go on?\n\n{start}",
    "Finish this story, please:\n\n{start}",
    "Here is the beginning of a story. Write the rest.\n\n{start}",
    "{start}\n\nWhat happens next? Write the rest of the story.",
    "I began a story: {start} Please finish it.",
    "Write the end of this story: {start}",
)


def make_continue(random: Random, thinking: bool, size: int) -> Item:
    """The first sentences are given, the rest is asked for."""
    story, cut = tell(random), random.randint(2, 4)
    sentences = SENTENCE.split(story.text)
    start, rest = " ".join(sentences[:cut]), " ".join(sentences[cut:])
    if not says(rest, story.hero):
        return make_continue(random, thinking, size)
    reasoning = f"The story is about {story.hero}. I tell what happens next, and how it ends." if thinking else ""
    return Item(
        "continue_story", f"{story.plot}|{story.hero}|{story.thing}|{cut}",
        asked(ask(random.choice(CONTINUE), random, start=start), random),
        rest, reasoning, thinking=thinking, wanted=(story.hero, start),
    )  # fmt: skip


def judge_continue(item: Item, completion: Completion) -> bool:
    """New sentences about the same hero, and an end."""
    hero, start = item.wanted
    new = completion.content.strip()
    return plain(completion) and says(new, hero) and is_story(new, 25) and SENTENCE.split(new)[0] not in start


# --- being asked about one ----------------------------------------------------------------------------------------

FRAMES = (
    "Read this story.\n\n{story}\n\n{question}",
    "{story}\n\n{question}",
    "{story}\n\nQuestion: {question}",
    "Story: {story}\n\nQuestion: {question}",
    "Here is a story: {story}\n\n{question}",
    "{question}\n\n{story}",
    "Answer a question about this story.\n\n{story}\n\n{question}",
    "Listen: {story}\n\nNow tell me: {question}",
    "{question} Here is the story.\n\n{story}",
    "I read this to my children.\n\n{story}\n\nThey ask: {question}",
    "{story}\n\n{question} Answer in a few words.",
    "Look for the answer in the story.\n\n{story}\n\n{question}",
)
ANSWERS = {
    "hero": ("It is about {word}.", "{word}."),
    "friend": ("It was {word}.", "{word}."),
    "place": ("It was {at}.", "{at}."),
    "thing": ("It was a {word}.", "A {word}."),
    "pet": ("It was a {word}.", "A {word}."),
    "colour": ("It was {word}.", "{word}."),
    "feeling": ("{hero} felt {word}.", "{word}."),
}
LONGEST_ANSWER = 25  # words: who tells the story again has not answered


def make_question(random: Random, thinking: bool, size: int) -> Item:
    """A story and a question that one word of it answers."""
    story = tell(random)
    question = random.choice(story.questions)
    answer = random.choice(ANSWERS[question.slot]).format(word=question.answer, at=story.at, hero=story.hero)
    reasoning = f"{_evidence(story.text, question)} So the answer is {question.answer}." if thinking else ""
    text = ask(random.choice(FRAMES), random, story=story.text, question=question.text)
    key = f"{story.plot}|{story.hero}|{question.text}|{question.answer}"
    return Item(
        "story_question", key, asked(text, random), sentence_case(answer), reasoning,
        thinking=thinking, wanted=question.answer, facts={"slot": question.slot},
    )  # fmt: skip


def _evidence(story: str, question: Question) -> str:
    """The sentence with the answer that has most of the question's words; the last of them for a feeling."""
    sentences = [sentence for sentence in SENTENCE.split(story) if says(sentence, question.answer)]
    asked_for = set(question.text.rstrip("?").split())
    if question.slot == "feeling":
        return f'The story says: "{sentences[-1]}"'
    return f'The story says: "{max(sentences, key=lambda sentence: len(asked_for & set(sentence.split())))}"'


def judge_question(item: Item, completion: Completion) -> bool:
    """The word, in a short answer."""
    return short(completion, LONGEST_ANSWER) and says(completion.content, item.wanted)


FAMILIES: dict[str, Family] = {
    "story": Family(make_story, judge_story),
    "continue_story": Family(make_continue, judge_continue),
    "story_question": Family(make_question, judge_question),
}
