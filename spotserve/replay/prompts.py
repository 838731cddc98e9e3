"""Prompts for replays and demonstrations: beginnings of Python code, put together by seed to a wanted length.

A replay has no tokenizer, so lengths are approximate: the demo model's tokenizer makes about one token of
`CHARACTERS_PER_TOKEN` characters of code, and the exact number comes back in the answer's usage. Pure.
"""

from random import Random

from spotserve.replay.timeline import Arrive

CHARACTERS_PER_TOKEN = 3.1

_OPENINGS = r'''
def fibonacci(n):
    """Return the first n Fibonacci numbers."""
--
def is_prime(number):
    """Tell whether number has no divisor but one and itself."""
    if number < 2:
        return False
--
class Stack:
    def __init__(self):
        self._items = []

    def push(self, item):
--
def read_lines(path):
    """Yield the lines of a file without their line ends."""
    with open(path) as file:
--
def merge(left, right):
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
--
def flatten(nested):
    """Turn a list of lists into one list."""
    for item in nested:
--
class Node:
    def __init__(self, value, parent=None):
        self.value = value
        self.children = []
--
def count_words(text):
    counts = {}
    for word in text.split():
        counts[word] = counts.get(word, 0) + 1
--
def parse_header(line):
    name, separator, value = line.partition(':')
    if not separator:
        raise ValueError(line)
--
import os
import sys


def walk(root):
    for name in sorted(os.listdir(root)):
        path = os.path.join(root, name)
--
def binary_search(items, wanted):
    """Return the index of wanted in the sorted list items, or -1."""
    low, high = 0, len(items)
--
class Queue:
    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self._waiters = []

    def put(self, item):
--
def retry(function, attempts):
    for attempt in range(attempts):
        try:
            return function()
        except OSError as error:
--
def format_size(num_bytes):
    """Return a size in bytes as a short text with a unit."""
    for unit in ("B", "KiB", "MiB"):
--
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
--
def chunked(iterable, size):
    chunk = []
    for item in iterable:
        chunk.append(item)
        if len(chunk) == size:
--
def quote(text):
    """Escape quotes and backslashes."""
    return text.replace("\\", "\\\\")


def unquote(text):
--
class Reader:
    def __init__(self, stream):
        self.stream = stream
        self.line = 0

    def __iter__(self):
        return self
--
def leap_year(year):
    """Tell whether a year has a 29th of February."""
--
def transpose(rows):
    width = max(len(row) for row in rows)
    columns = [[] for _ in range(width)]
    for row in rows:
--
def gcd(a, b):
    """Return the greatest common divisor of a and b."""
    while b:
--
class Cache:
    def __init__(self, size):
        self.size = size
        self.hits = 0
        self.misses = 0

    def get(self, key, default=None):
--
def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument('files', nargs='*')
    parser.add_argument('--verbose', action='store_true')
--
def common_prefix(names):
    """Return the longest text that every name begins with."""
    shortest = min(names)
    longest = max(names)
--
class Matrix:
    def __init__(self, rows):
        self.rows = [list(row) for row in rows]

    def __add__(self, other):
--
def test_split():
    assert split('a,b,c') == ['a', 'b', 'c']
    assert split('') == []


def test_join():
--
def topological_order(graph):
    """Return the nodes so that every edge points forward."""
    seen = set()
    order = []

    def visit(node):
--
class Timer:
    def __enter__(self):
        self.start = clock()
        return self

    def __exit__(self, *exc_info):
--
def to_roman(number):
    numerals = [(1000, 'M'), (900, 'CM'), (500, 'D'), (400, 'CD'), (100, 'C'), (90, 'XC')]
    text = ''
--
def group_by(items, key):
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
--
def strip_comments(lines):
    """Yield the lines without what follows a hash sign."""
    for line in lines:
        code, _, comment = line.partition("#")
--
class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __eq__(self, other):
        if not isinstance(other, Point):
'''

OPENINGS = tuple(opening + "\n" for opening in _OPENINGS.strip("\n").split("\n--\n"))
"""How a piece of code may begin."""


def prompt_of(arrival: Arrive, prefix_block_tokens: int) -> str:
    """The prompt of a request: blocks that others may begin with as well, each the same text wherever it stands, then its own."""
    shared = arrival.prefix[: arrival.prompt_tokens // prefix_block_tokens] if prefix_block_tokens else ()
    blocks = [build_prompt(prefix_block_tokens, block) + "\n\n" for block in shared]
    left = arrival.prompt_tokens - len(shared) * prefix_block_tokens
    return "".join(blocks) + (build_prompt(left, arrival.seed) if left > 0 or not blocks else "")


def build_prompt(prompt_tokens: int, seed: int) -> str:
    """Text of about `prompt_tokens` tokens that ends in the middle of a piece of code; the same seed gives the same text."""
    assert prompt_tokens >= 1
    wanted = max(1, round(prompt_tokens * CHARACTERS_PER_TOKEN))
    random = Random(seed)
    pieces: list[str] = []
    length = 0
    while length < wanted:
        pieces.append(random.choice(OPENINGS) + "\n\n")
        length += len(pieces[-1])
    return "".join(pieces)[:wanted].rstrip() or "def"
