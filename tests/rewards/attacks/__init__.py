"""Programs that try to be paid without solving the task, or to reach out of the sandbox. None may succeed.

The task is always `add(a, b)`. A program that tries to escape answers rightly *only if its escape worked*, so a verdict
`correct` is a success of the attack; so is `error` (a sample that escapes its zero), and so is an effect that a witness
outside sees (a file, a connection, a signal). `python -m tests.rewards.attacks` tries them on the machine it runs on.
"""
