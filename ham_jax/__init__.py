"""Train, evaluate and use skin-lesion classifiers on HAM10000. Not a medical device."""

CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
"""HAM10000's seven diagnoses (`dx`), in the order of every label, logit and probability."""

DISCLAIMER = "Educational and research use, not a diagnosis."
