"""English for the tokenizer and for caption noise: ordinary prompts, so that unknown words do not derail the model."""

import numpy as np

DEFAULT_NEGATIVE_PROMPT = (
    "bright colors, overexposed, static, blurred details, subtitles, style, artwork, painting, picture, "
    "still, overall gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra "
    "fingers, poorly drawn hands, poorly drawn faces, deformed, disfigured, malformed limbs, fused "
    "fingers, still picture, cluttered background, three legs, many people in the background, walking "
    "backwards"
)
"""The endpoint's default, which is the unconditional branch of nearly every request."""

EXAMPLES = (
    (
        "A tabby cat is confidely strolling toward the camera, when it spins and with a flash of magic "
        "reveals itself to be a cat-dragon hybrid with glistening amber scales."
    ),
    (
        "CG animation style, a small blue bird takes off from the ground, flapping its wings. The bird's "
        "feathers are delicate, with a unique pattern on its chest. The background shows a blue sky with "
        "white clouds under bright sunshine. The camera follows the bird upward, capturing its flight and the"
        " vastness of the sky from a close-up, low-angle perspective."
    ),
    "Make the scene come alive. The video starts at the first picture and ends at the last picture.",
    (
        "A smooth transition between the two images, cinematic lighting, high detail, slow motion, shallow "
        "depth of field."
    ),
    (
        "Time lapse of a city street from day to night, cars leave long trails of light, the sky turns from "
        "blue to orange."
    ),
    ("She turns her head slowly and smiles, wind moves through her dark hair while the sun sets behind the mountains."),
)

ADJECTIVES = [
    "small",
    "large",
    "old",
    "young",
    "tall",
    "bright",
    "dark",
    "quiet",
    "golden",
    "silver",
    "wooden",
    "glass",
    "wild",
    "gentle",
    "happy",
    "lonely",
    "busy",
    "ancient",
    "modern",
    "snowy",
    "rainy",
    "sunny",
    "misty",
    "colourful",
    "soft",
    "shiny",
    "dusty",
    "broken",
    "beautiful",
    "giant",
    "tiny",
    "fluffy",
    "elegant",
    "rusty",
    "green",
    "red",
    "blue",
]
THINGS = [
    "cat",
    "dog",
    "bird",
    "horse",
    "fish",
    "dragon",
    "robot",
    "child",
    "woman",
    "man",
    "dancer",
    "painter",
    "sailor",
    "car",
    "train",
    "boat",
    "bicycle",
    "plane",
    "ship",
    "house",
    "castle",
    "tower",
    "tree",
    "flower",
    "leaf",
    "mountain",
    "river",
    "lake",
    "ocean",
    "wave",
    "cloud",
    "star",
    "moon",
    "candle",
    "lamp",
    "book",
    "cup",
    "clock",
    "door",
    "window",
    "street",
    "bridge",
    "market",
    "garden",
    "forest",
    "field",
    "desert",
    "island",
    "city",
    "village",
    "kitchen",
    "room",
    "balloon",
    "kite",
    "butterfly",
    "spider",
    "rabbit",
]
ACTIONS = [
    "walks",
    "runs",
    "jumps",
    "turns",
    "spins",
    "flies",
    "swims",
    "floats",
    "falls",
    "rises",
    "opens",
    "closes",
    "grows",
    "shrinks",
    "dances",
    "sings",
    "smiles",
    "looks",
    "waves",
    "moves",
    "drifts",
    "glows",
    "melts",
    "burns",
    "freezes",
    "transforms",
    "disappears",
    "appears",
    "climbs",
    "rolls",
    "rotates",
    "slides",
    "stops",
    "starts",
    "waits",
]
MANNERS = [
    "slowly",
    "quickly",
    "gently",
    "suddenly",
    "gracefully",
    "calmly",
    "happily",
    "carefully",
    "quietly",
    "steadily",
    "away",
    "forward",
    "backward",
    "again",
]
PLACES = [
    "across the bridge",
    "through the forest",
    "over the sea",
    "under the trees",
    "along the beach",
    "into the light",
    "out of the house",
    "towards the camera",
    "around the table",
    "near the window",
    "behind the mountains",
    "in the rain",
    "at night",
    "in the morning",
    "between tall buildings",
    "above the clouds",
    "on a dusty road",
    "in front of a crowd",
    "at sunset",
    "during a storm",
]
ENDINGS = [
    "The camera follows the movement",
    "The camera pans to the left",
    "The camera slowly zooms in",
    "The light changes from warm to cold",
    "Leaves are blowing in the wind",
    "Everything is covered with snow",
    "Realistic style, high quality, sharp focus",
    "Shot on film with natural colours",
    "The background stays blurred",
    "People watch from a distance",
    "Smoke rises into the air",
    "Reflections shimmer on the water",
    "Anime style with vivid colours",
    "Close-up view, shallow depth of field",
    "Aerial view, wide angle, dramatic perspective",
    "The scene becomes brighter and then fades",
]


def sentence(rng: np.random.Generator) -> str:
    """Draw one to three plausible sentences about nothing in particular."""

    def pick(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    text = f"A {pick(ADJECTIVES)} {pick(THINGS)} {pick(ACTIONS)} {pick(MANNERS)} {pick(PLACES)}"
    if rng.random() < 0.5:
        text += f" while the {pick(ADJECTIVES)} {pick(THINGS)} {pick(ACTIONS)} {pick(PLACES)}"
    text += "."
    for _ in range(int(rng.integers(0, 3))):
        text += f" {pick(ENDINGS)}."
    return text


def corpus(captions: list[str]) -> list[str]:
    """Return the tokenizer's training text."""
    rng = np.random.default_rng(0)
    return captions + [DEFAULT_NEGATIVE_PROMPT] * 60 + list(EXAMPLES) * 60 + [sentence(rng) for _ in range(2000)]
