"""The study of gate losses, `make study-judge`: which judge tells good rows from bad ones?

`design` says what is tried, `pools` makes the rows, `features` reads them once with the frozen judge, `gates` trains
observers on what was read, `applied` runs the real stages, `statistics` compares, `findings` and `page` write it down.
"""
