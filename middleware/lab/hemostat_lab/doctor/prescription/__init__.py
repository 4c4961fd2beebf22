"""The prescription: bits, group size and sparsity of each layer within a budget of bytes, and what they cost in KL.

candidates     what a layer can be stored as, and its weight then
html           the page's section on the prescription
losses         what each candidate of each layer is predicted to cost
mixes          which candidate each layer gets: prescribed for a budget, or the same for all
report         the prescription for a budget of bytes: predicted, and measured on other texts
rounded_mixes  mixes carried out in a model
words          the prescription in sentences
"""
