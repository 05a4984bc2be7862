"""The paper's experiments: what each run is, what the paper reports, and the pages that set the two side by side."""
