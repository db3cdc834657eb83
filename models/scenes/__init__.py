"""The embedded toy text-to-image model `scenes`.

It makes 48x48 px pictures of simple shapes, and has with it all that it takes to train and to
measure it: prompts in five groups after GenEval, pictures drawn by code from a seed, a picture
tokenizer of 512 codes, and an exact judge of whether a picture shows what its prompt asks for.
"""
