"""What every package needs and none owns: configuration, errors, run folders, checkpoints, atomic files.

It lives in ``rec`` because imports run one way (launch → align → llm → rec) and this is the bottom.
"""
