"""The vocabulary that all tiny models share."""

VOCAB_SIZE = 99
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = 0, 1, 2
# Ordinary tokens, between the padding, start and end tokens and the special ones of images and audio.
FIRST_TOKEN, LAST_TOKEN = 3, 88
IMAGE_TOKEN, VISION_START_TOKEN, VISION_END_TOKEN = 90, 93, 94
