"""What ``perqueue doctor`` looks at, a room for each subject.

Each check is a generator of findings, so that what is known is shown while the next one is still waiting.
None changes anything, here or at Per.
"""
