"""Owns the words that stories and problems are told with. What is `HELD_` no training problem has."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Anna Ben Carla David Emma Frank Grace Henry Ivy Jack Kate Liam Mia Noah Olga Paul Rosa Sam Tina Victor Wendy "
    "Yusuf Alice Boris Clara Dennis Elsa Felix Hana Igor Julia Kevin Lucy Martin Nora Oscar Petra Ralph Sofia Thomas "
    "Ursula Zoe"
)
HELD_NAMES = _words(
    "Amir Bella Chen Diana Erik Fatima George Helen Ibrahim Jana Karl Leila Marco Nadia Otto Priya Ravi Simon Tara Umar"
)
THINGS = _words(
    "apples pens books stamps marbles shells coins cards eggs cakes pears plums cups plates bottles boxes bags hats "
    "socks shirts buttons beads stones leaves flowers roses tulips trees candles lamps chairs toys dolls balls kites "
    "pencils erasers stickers photos letters tickets maps keys nails screws bricks ropes carrots onions potatoes "
    "tomatoes lemons oranges grapes cherries nuts biscuits sweets loaves fish hens ducks goats sheep horses rabbits"
)
HELD_THINGS = _words("peaches mugs scarves badges ribbons melons pigeons spoons magnets crayons")
PLACES = _words(
    "market school garden park library shop station farm kitchen river beach village town museum forest harbour "
    "bakery field bridge castle"
)
COLOURS = _words("red blue green yellow white black brown grey")
ADJECTIVES = _words("old new small large round heavy light clean dusty broken pretty plain")
FRIENDS = _words("friend sister brother mother father aunt uncle cousin neighbour teacher")
WEATHER = _words("sunny rainy windy cold warm cloudy foggy snowy")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
