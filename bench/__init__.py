"""How a method is judged: the program. From Python: `bench.run.run(bench.config.compose(["task=digits"]))`."""
