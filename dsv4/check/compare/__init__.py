"""Where two ways to run one model part: the same text through both, op by op, beside what rounding alone would do."""
