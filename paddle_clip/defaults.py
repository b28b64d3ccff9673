"""Defaults that functions and the command line share; nothing is imported for them, so that `--help` is quick."""

TEMPLATE = "a photo of a {}."  # caption or prompt of a class
CHINESE_TEMPLATE = "一张{}的照片"  # that of Chinese-CLIP
BATCH_SIZE = 64  # images encoded at once, pairs trained on at once
LABELS_SHOWN = 5  # of an image that is classified
IMAGES_FOUND = 10  # of a search

NOT_UTF8 = "is not a text in UTF-8: save it as one (in Excel: CSV UTF-8), or of GBK run iconv -f GBK -t UTF-8"

# Fine-tuning
EPOCHS = 1
ACCUMULATE = 1
LEARNING_RATE = 1e-5
WARMUP = 0.1
WEIGHT_DECAY = 0.2
SEED = 0
