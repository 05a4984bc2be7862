"""The paper's experiments: the options of each run, the numbers the paper reports, and pages that compare the two."""
