"""The prescription: bits, group size and sparsity of each layer within a budget of bytes, and what they cost in KL.

candidates     what a layer can be stored as, and its weight then
html           the page's section on the prescription
losses         what each candidate of each layer is predicted to cost
mixes          which candidate each layer gets (prescribed for a budget, or the same for all), and carries mixes out
report         the prescription for a budget of bytes: predicted, and measured on other texts
words          the prescription in sentences
"""
