"""Where a data set's texts lie in the model's last hidden states: how alike items are, and how alike question and answer.

An embedding is the mean of a text's last hidden states (model.pooling). Question and answer are read apart, as plain text
outside the template: an answer that has seen its question, or shares a frame with it, resembles it whatever it says. Each
dimension is standardised by its mean and deviation over a fixed set of general texts (features.probe.general_records), after
arXiv 2109.04404. (Over the data set itself, every mean cosine would be 0.)
"""

from __future__ import annotations

import numpy as np

from data.records import Record
from features.dataset import Sample
from features.likelihood import checked, longest
from features.probe import general_records
from model.llama import Llama
from model.pooling import centre, encode_texts, state_sums, unit
from model.subject import Subject
from model.tokenizer import Tokenizer

EMBEDDING_COLUMNS = ("io_similarity", "semantic_diversity", "similarity_std", "embedding_outlier_ratio")
FEWEST = 10  # items of which outliers are told


def embedding_features(subject: Subject, sample: Sample, batch_size: int) -> dict:
    """The columns of EMBEDDING_COLUMNS, and "reason" where one is None: too few items.

        io_similarity             mean over items of cosine(question, answer)
        semantic_diversity        1 - mean cosine of all pairs of items (question and answer together)
        similarity_std            standard deviation of these cosines (3 items and more): large where items form groups
        embedding_outlier_ratio   share of items whose distance to the items' mean is above median + 3.5 * 1.4826 * MAD
                                  (10 items and more): the robust z-score of Iglewicz and Hoaglin, at their limit

    batch_size: items in a pass. The model is as it was afterwards.
    """
    model, tokenizer = subject.model, subject.tokenizer
    middle, spread = centre(embed(model, tokenizer, general_records(tokenizer), batch_size)[2])
    ours = embed(model, tokenizer, sample.records, batch_size)
    questions, answers, items = ((x - middle) / spread for x in ours)  # (N, H) each
    found = dict.fromkeys(EMBEDDING_COLUMNS)
    both = np.isfinite(questions).all(1) & np.isfinite(answers).all(1)  # a text of no token has no embedding
    if both.any():
        found["io_similarity"] = (unit(questions[both]) * unit(answers[both])).sum(1).mean()
    items = items[np.isfinite(items).all(1)]
    if len(items) > 1:
        mean, deviation = pair_cosines(items)
        found["semantic_diversity"] = 1 - mean
        found["similarity_std"] = deviation if len(items) > 2 else None
    if len(items) >= FEWEST:
        found["embedding_outlier_ratio"] = outliers(items).mean()
    said = [f"embedding: {len(items)} items are too few for all features"] if len(items) < FEWEST else []
    return checked(found, "embedding", said)


def embed(model: Llama, tokenizer: Tokenizer, records: list[Record], batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings (N, H) float64 of the questions (all turns of a prompt), of the answers, and of both together; NaN for no token."""
    texts = [text for record in records for text in ("\n".join(content for _, content in record.prompt), record.answer)]
    begin, texts = encode_texts(model, tokenizer, texts, longest(model))
    sums = np.concatenate([state_sums(model, begin, texts[at : at + 2 * batch_size]) for at in range(0, len(texts), 2 * batch_size)])
    counts = np.array([[len(ids)] for ids in texts], dtype=np.float64)  # (2 N, 1)
    with np.errstate(invalid="ignore"):
        means, both = sums / counts, (sums[::2] + sums[1::2]) / (counts[::2] + counts[1::2])
    return means[::2], means[1::2], both


def pair_cosines(x: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the cosines of all pairs of rows of x (N, H), N > 1, without the (N, N) matrix.

    Of unit rows u: the sum of u_i u_j over all i, j is |sum u|², that of its squares |U^T U|²; the N pairs of a row with itself leave.
    """
    u, n = unit(x), len(x)
    mean = ((u.sum(0) ** 2).sum() - n) / (n * (n - 1))
    square = (((u.T @ u) ** 2).sum() - n) / (n * (n - 1))
    return float(mean), float(np.sqrt(max(square - mean**2, 0.0)))


def outliers(x: np.ndarray, limit: float = 3.5) -> np.ndarray:
    """(N,) bool: whose distance to the rows' mean is above median + limit * 1.4826 * MAD of these distances.

    Where most rows are copies the MAD is 0 and only rounding would be left: what lies within a thousandth of the
    standardised space's scale (sqrt(H)) of the median never counts.
    """
    distances = np.linalg.norm(x - x.mean(0), axis=1)
    middle = np.median(distances)
    reach = limit * 1.4826 * np.median(np.abs(distances - middle))
    return distances > middle + max(reach, 1e-3 * x.shape[1] ** 0.5)
