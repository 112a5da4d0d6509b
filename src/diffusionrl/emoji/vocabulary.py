"""What the embedded world can draw: names, code points in Noto Color Emoji, and the prompts made of them."""

# The 45 animals of DDPO's prompt list (arXiv 2305.13301, App. D), in the paper's order.
DDPO_ANIMALS = {
    "cat": "1F408", "dog": "1F415", "horse": "1F40E", "monkey": "1F412", "rabbit": "1F407", "zebra": "1F993",
    "spider": "1F577", "bird": "1F426", "sheep": "1F411", "deer": "1F98C", "cow": "1F404", "goat": "1F410",
    "lion": "1F981", "tiger": "1F405", "bear": "1F43B", "raccoon": "1F99D", "fox": "1F98A", "wolf": "1F43A",
    "lizard": "1F98E", "beetle": "1FAB2", "ant": "1F41C", "butterfly": "1F98B", "fish": "1F41F", "shark": "1F988",
    "whale": "1F40B", "dolphin": "1F42C", "squirrel": "1F43F", "mouse": "1F42D", "rat": "1F400", "snake": "1F40D",
    "turtle": "1F422", "frog": "1F438", "chicken": "1F414", "duck": "1F986", "goose": "1FABF", "bee": "1F41D",
    "pig": "1F416", "turkey": "1F983", "fly": "1FAB0", "llama": "1F999", "camel": "1F42B", "bat": "1F987",
    "gorilla": "1F98D", "hedgehog": "1F994", "kangaroo": "1F998",
}  # fmt: skip

OTHER_ANIMALS = {
    "elephant": "1F418", "giraffe": "1F992", "rhinoceros": "1F98F", "hippopotamus": "1F99B", "leopard": "1F406",
    "crocodile": "1F40A", "octopus": "1F419", "squid": "1F991", "crab": "1F980", "lobster": "1F99E", "snail": "1F40C",
    "scorpion": "1F982", "penguin": "1F427", "owl": "1F989", "eagle": "1F985", "flamingo": "1F9A9", "peacock": "1F99A",
    "parrot": "1F99C", "swan": "1F9A2", "sloth": "1F9A5", "otter": "1F9A6", "skunk": "1F9A8", "badger": "1F9A1",
    "beaver": "1F9AB", "panda": "1F43C", "koala": "1F428", "seal": "1F9AD", "bison": "1F9AC", "rooster": "1F413",
    "ladybug": "1F41E",
}  # fmt: skip

THINGS = {
    "apple": "1F34E", "banana": "1F34C", "strawberry": "1F353", "watermelon": "1F349", "pineapple": "1F34D",
    "carrot": "1F955", "cheese": "1F9C0", "hamburger": "1F354", "pizza": "1F355", "cake": "1F370", "car": "1F697",
    "bus": "1F68C", "rocket": "1F680", "sailboat": "26F5", "house": "1F3E0", "tree": "1F333", "sunflower": "1F33B",
    "mushroom": "1F344", "cactus": "1F335", "guitar": "1F3B8", "drum": "1F941", "football": "26BD", "book": "1F4D5",
    "key": "1F511", "umbrella": "2602", "hat": "1F3A9", "shoe": "1F45F", "bell": "1F514", "balloon": "1F388",
    "gift": "1F381", "camera": "1F4F7", "chair": "1FA91",
}  # fmt: skip

# The three activities of DDPO's alignment prompts, each drawn as the animal above a prop.
ACTIVITIES = {"riding a bike": "1F6B2", "playing chess": "265F", "washing dishes": "1F37D"}

# Each has a sprite for two genders and five skin tones.
OCCUPATIONS = {
    "doctor": "2695", "farmer": "1F33E", "cook": "1F373", "teacher": "1F3EB", "student": "1F393", "singer": "1F3A4",
    "artist": "1F3A8", "astronaut": "1F680", "firefighter": "1F692", "mechanic": "1F527", "scientist": "1F52C",
    "programmer": "1F4BB", "pilot": "2708", "judge": "2696", "factory worker": "1F3ED", "office worker": "1F4BC",
}  # fmt: skip
GENDERS = {"man": "1F468", "woman": "1F469"}
SKIN_TONES = {"light": "1F3FB", "medium-light": "1F3FC", "medium": "1F3FD", "medium-dark": "1F3FE", "dark": "1F3FF"}

ANIMALS = DDPO_ANIMALS | OTHER_ANIMALS
SUBJECTS = ANIMALS | THINGS

# Two deliberate biases of the training distribution, for later work to repair by reward:
# light tones dominate among people, and activities were shown for every third animal only.
SKIN_TONE_SHARES = {"light": 0.5, "medium-light": 0.3, "medium": 0.1, "medium-dark": 0.06, "dark": 0.04}
ACTIVE_ANIMALS = tuple(DDPO_ANIMALS)[::3]

# Held out of training by reward, to see what it generalises to. The embedded model has drawn all of them in its pretraining.
UNSEEN_THINGS = tuple(THINGS)[-8:]
UNSEEN_OCCUPATIONS = tuple(OCCUPATIONS)[-4:]


def with_article(noun: str) -> str:
    """``"ant"`` -> ``"an ant"``. By spelling: enough for every noun of this file."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def person(occupation: str, gender: str, tone: str) -> str:
    """The name of a person's sprite in the atlas."""
    return f"{occupation}/{gender}/{tone}"


def sprite_code_points() -> dict[str, list[int]]:
    """Every sprite of the atlas, in atlas order: name -> the code points that draw it."""
    table = {name: [int(code, 16)] for name, code in (SUBJECTS | ACTIVITIES).items()}
    for occupation, badge in OCCUPATIONS.items():
        for gender, figure in GENDERS.items():
            for tone, modifier in SKIN_TONES.items():
                sequence = [figure, modifier, "200D", badge]  # zero-width joiner between the person and the badge
                table[person(occupation, gender, tone)] = [int(code, 16) for code in sequence]
    return table


def subject_of(text: str) -> str | None:
    """``"dog riding a bike"`` -> ``"dog"``: the subject that a text without an article names, or None if it names none."""
    stem = next((text.removesuffix(f" {activity}") for activity in ACTIVITIES if text.endswith(f" {activity}")), text)
    return stem if stem in SUBJECTS else None


def caption_sets() -> dict[str, list[str]]:
    """Prompts by name, each of which the tokenizer is trained on."""
    return {
        "ddpo-animals": [with_article(name) for name in DDPO_ANIMALS],
        "other-animals": [with_article(name) for name in OTHER_ANIMALS],
        "things": [with_article(name) for name in THINGS],
        "activities": [f"{with_article(name)} {activity}" for name in DDPO_ANIMALS for activity in ACTIVITIES],
        "occupations": [with_article(name) for name in OCCUPATIONS],
    }


def prompt_sets() -> dict[str, list[str]]:
    """The built-in prompts by name: the above, and those that hold something out of training by reward."""
    pairs = [(first, second) for first in THINGS for second in THINGS if first != second]
    seen = [pair for pair in pairs if not set(pair) & set(UNSEEN_THINGS)]
    unseen = [pair for pair in pairs if set(pair) & set(UNSEEN_THINGS)]
    return caption_sets() | {
        "thing-pairs": [f"{with_article(first)} and {with_article(second)}" for first, second in seen],
        "unseen-thing-pairs": [f"{with_article(first)} and {with_article(second)}" for first, second in unseen],
        "seen-occupations": [with_article(name) for name in OCCUPATIONS if name not in UNSEEN_OCCUPATIONS],
        "unseen-occupations": [with_article(name) for name in UNSEEN_OCCUPATIONS],
    }
