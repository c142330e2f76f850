"""The words that `make_samples.py` puts together; all written for this purpose, so they may be used
freely.
"""

from __future__ import annotations

# A word to guess: hints that never say it.
HINTS = {
    "kettle": (
        "it stands in a kitchen",
        "it gets hot",
        "it whistles when it is done",
        "tea begins with it",
    ),
    "ladder": (
        "it has many steps",
        "it leans against a wall",
        "painters carry one",
        "you climb it",
    ),
    "pillow": ("it is soft", "it lies on a bed", "heads rest on it", "children fight with it"),
    "compass": (
        "it has a needle",
        "sailors trust it",
        "it always knows the north",
        "it fits in a pocket",
    ),
    "umbrella": (
        "it opens and closes",
        "it has a handle",
        "it is useless in the sun",
        "it keeps you dry",
    ),
    "candle": (
        "it gives light",
        "it gets shorter with time",
        "wax runs down its side",
        "a birthday cake has some",
    ),
    "bridge": (
        "it crosses water",
        "cars use it",
        "it joins two banks",
        "some of them open for ships",
    ),
    "mirror": (
        "it hangs on a wall",
        "it is made of glass",
        "it shows whoever looks",
        "left and right are swapped in it",
    ),
    "anchor": (
        "it is heavy",
        "it belongs to a ship",
        "it goes down on a chain",
        "it keeps something in its place",
    ),
    "violin": (
        "it has four strings",
        "it is made of wood",
        "it is played with a bow",
        "an orchestra has many",
    ),
    "glacier": ("it is very cold", "it moves slowly", "it carves valleys", "it is a river of ice"),
    "lantern": (
        "it is carried at night",
        "it has a handle and glass",
        "a flame lives in it",
        "campers like it",
    ),
    "saddle": (
        "it is made of leather",
        "a rider needs it",
        "it sits on a back",
        "a bicycle has one as well",
    ),
    "envelope": (
        "it is made of paper",
        "it gets a stamp",
        "something is folded inside",
        "you lick it to close it",
    ),
    "orchard": (
        "trees stand there in rows",
        "it blossoms in spring",
        "people climb there in autumn",
        "it is full of fruit",
    ),
    "thimble": ("it is tiny", "it is worn on a finger", "a tailor uses it", "it stops a needle"),
}
OPENINGS = (
    "Let us play: you think of a word, I guess it. Hints are fine, but never say the word itself.",
    "You know a secret word. Help me to find it, and do not give it away before I have guessed it.",
    "I am the user who guesses, you are the model that knows the word. What is your first hint?",
    "Secret word game! One hint at a time, please.",
)
DOUBTS = (
    "I am lost. Another hint?",
    "Hmm, a model railway perhaps? Or is that too far off?",
    "Can you say more without giving it away?",
    "The assistant in the shop would know. I do not. Go on.",
)

NAMES = (
    "Ada",
    "Ben",
    "Carla",
    "Dario",
    "Emil",
    "Fatima",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Kemal",
    "Lena",
)
THINGS = ("tickets", "notebooks", "apples", "lamps", "chairs", "postcards", "bottles", "bricks")

# Topic: what can be said of it.
ADVICE = {
    "watering herbs on a balcony": (
        "Herbs want water in the morning, before the sun is high.",
        "Put a finger into the soil: if it is dry two joints deep, water it.",
        "Pots need a hole at the bottom, or the roots rot.",
    ),
    "baking bread without a machine": (
        "Flour, water, salt and a little yeast are enough.",
        "Let the dough rest overnight; time does what kneading would do.",
        "A hot iron pot with a lid gives a good crust.",
    ),
    "learning to swim as an adult": (
        "Start where you can stand.",
        "Breathe out under water first, everything else follows from that.",
        "Two short lessons a week are better than one long one.",
    ),
    "choosing a second-hand bicycle": (
        "Check that the frame is straight and has no cracks.",
        "A worn chain is cheap to replace, a bent fork is not.",
        "Ride it around the block and brake hard once.",
    ),
    "reading old maps": (
        "Look for the scale and the year before anything else.",
        "North is not always at the top.",
        "Names of villages change more often than rivers do.",
    ),
    "keeping bees in a small garden": (
        "Ask your neighbours first.",
        "Two hives are easier to judge than one, because you can compare them.",
        "Most work falls into May and June.",
    ),
    "repairing a dripping tap": (
        "Turn the water off before you open anything.",
        "Nine times out of ten it is the rubber washer.",
        "Take the old washer to the shop to get the same size.",
    ),
    "writing a letter of complaint": (
        "Say in the first sentence what you want.",
        "Give the date, the order number and one fact per paragraph.",
        "Stay polite: a person reads it.",
    ),
}
QUESTIONS = (
    "What should I know about {topic}?",
    "I am new to {topic}. Where do I begin?",
    "Give me advice on {topic}.",
    "My neighbour talks of nothing but {topic}. What is there to it?",
    "Tell me about {topic} in a few sentences.",
)
FOLLOW_UPS = (
    "Is there anything else?",
    "Which of these matters most?",
    "What do people get wrong there?",
)

# Language: question, answer, thanks, reply to it.
OTHER_LANGUAGES = {
    "de": (
        "Wie reinige ich eine alte Holzbank?",
        "Mit lauwarmem Wasser und einer weichen Bürste. Danach gut trocknen lassen.",
        "Danke, und womit öle ich sie?",
        "Leinöl reicht, dünn aufgetragen.",
    ),
    "es": (
        "¿Cómo elijo un buen melón?",
        "Debe pesar más de lo que parece y oler un poco dulce.",
        "¿Y si no huele a nada?",
        "Entonces espera dos días.",
    ),
    "fr": (
        "Comment conserver du basilic frais ?",
        "Mets les tiges dans un verre d'eau, loin du soleil.",
        "Combien de temps dure-t-il ainsi ?",
        "Environ une semaine.",
    ),
}

SUBJECTS = (
    "the film",
    "this drama",
    "the second half",
    "the cast",
    "a story about two sisters",
    "its slow ending",
)
PRAISE = (
    "moves without a false note",
    "is warm and funny",
    "rewards patience",
    "shines",
    "stays in the mind for days",
)
BLAME = (
    "drags on",
    "never finds its feet",
    "is loud and empty",
    "wastes a good idea",
    "forgets its own plot",
)
ADDITIONS = (
    "",
    "from start to finish",
    "in spite of its small budget",
    "as few others this year",
    "and knows it",
)

TOWNS = (
    "Arvel",
    "Bresk",
    "Corrin",
    "Dunmere",
    "Eskow",
    "Farholt",
    "Gelden",
    "Harrowby",
    "Istra",
    "Jelling",
)
RIVERS = ("Lune", "Moss", "Nerva", "Orbe", "Pell")
CRAFTS = ("glass", "paper", "clocks", "boats", "carpets")

PLACES = (
    "the station",
    "the old bakery",
    "room seven",
    "the library",
    "the north gate",
    "the pool",
)
EVENTS = ("dinner", "the concert", "the meeting", "football", "the exam", "the market")
EXCUSES = (
    "my train is late",
    "I have to feed the cat first",
    "my shift ends at six",
    "I must find my keys",
)
