"""Sentences of mixed lengths, the same in every run."""

from __future__ import annotations

import random

__all__ = ["sentences"]

_TEXT = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will more no if
out so what up said its about than into them can only other new some could time these two may then
do first any my now such like our over man me even most made after also did many before must
through back years where much your way well down should because each just those people how too
little state good very make world still own see men work long get here between both life being
under never day same another know while last might us great old year off come since against go
came right used take three states himself few house use during without again place around however
home small found thought went say part once general high upon school every does got united left
number course war until always away something fact though water less public put thing almost hand
enough far took head yet government system better set told nothing night end why called eyes find
going look asked later knew point next program city business give group toward young days let room
word side social given present several order national possible rather second face per among form
important often things looked early white case become large big need four within felt along
children saw best church ever least power development light seemed family interest want members
mind country area others turned although open done service certain kind different problem began
door thus means help sense whole matter held airport delay flight weather morning arrival engine
carrier runway pilot forecast storm schedule passenger gate terminal luggage ticket window seat
"""
_WORDS = tuple(_TEXT.split())

_SHORTEST, _LONGEST = 5, 60


def sentences(count: int, seed: int = 7) -> list[str]:
    """So many sentences of 5 to 60 words, every length as likely as another.

    Common words come more often than rare ones, as in English, so that the tokenizer has about
    as much to do.
    """
    chosen = random.Random(seed)
    weights = [1.0 / (rank + 10) for rank in range(len(_WORDS))]
    made = []
    for _ in range(count):
        words = chosen.choices(_WORDS, weights, k=chosen.randint(_SHORTEST, _LONGEST))
        for index in range(7, len(words) - 2, 8):
            words[index] += ","
        made.append(" ".join(words).capitalize() + ".")
    return made
