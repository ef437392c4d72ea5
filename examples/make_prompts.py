"""Writes prompts.parquet and messages.jsonl beside this script: 64 prompts of everyday batch work.

Run it again after editing `PROMPTS`; the same prompts give the same files, byte for byte.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

REVIEW = (
    "Label this product review as positive, negative or mixed. Answer with one word.\n\nReview: "
)
TICKET = (
    "Which team should handle this support ticket: billing, shipping, account or technical? "
    "Answer with one word.\n\nTicket: "
)
SUMMARY = "Summarise the following passage in one sentence.\n\n"

PROMPTS: dict[str, list[str]] = {
    "label": [
        REVIEW + "The kettle boils fast and looks lovely on the counter. Best purchase this year.",
        REVIEW + "Stopped charging after nine days. The seller never answered my three emails.",
        REVIEW
        + "Great screen and a comfortable keyboard, but the fan is so loud that I cannot use "
        "it in meetings, and the battery is gone by two in the afternoon.",
        REVIEW + "It is a spoon. It does what a spoon does.",
        TICKET + "I was charged twice for order 40817 and only one of the two was refunded.",
        TICKET
        + "The tracking page has said 'label created' since last Tuesday. Where is my parcel?",
        TICKET
        + "After the update the app shows a white screen on start. Phone: Pixel 6, Android 14. "
        "I already cleared the cache and installed it again.",
        "Is this message spam? Answer yes or no.\n\nCONGRATULATIONS!! You have been selected "
        "to receive a gift card worth $1000. Reply with your full name and address within 24 "
        "hours.",
        "Is this message spam? Answer yes or no.\n\nHi Dana, the dentist moved your "
        "appointment to Thursday at 9:40. Call us if that does not work.",
        "Name the language of this sentence: 'Kolik stojí jeden lístek do divadla?'",
        "Does the second sentence follow from the first? Answer yes, no or unclear.\n\n1. "
        "All of the bakery's bread was sold by noon.\n2. Nobody could buy bread there at "
        "three o'clock.",
    ],
    "translate": [
        "Translate to French: The train to Lyon leaves from platform four in ten minutes.",
        "Translate to Spanish: Please keep this door closed during the winter months.",
        "Translate to German: I would like to return these shoes, they are half a size too small.",
        "Translate to English: Il a plu toute la semaine, mais demain il fera beau.",
        "Translate to English: ¿Dónde puedo encontrar una farmacia que esté abierta por la noche?",
        "Translate to English: Der Vertrag verlängert sich um ein Jahr, wenn er nicht drei "
        "Monate vor Ablauf schriftlich gekündigt wird.",
        "Translate to Italian, keeping the polite form: Could you tell me which bus goes to "
        "the old town, and whether I can buy the ticket from the driver?",
        "Translate to Portuguese: happy birthday",
        "Translate this recipe step to French: Fold the beaten egg whites into the batter in "
        "three parts, slowly, so that the air stays in, then bake at 180 °C for 35 minutes.",
    ],
    "summarise": [
        SUMMARY
        + "Honeybees tell each other where food is by dancing. A bee that has found flowers "
        "returns to the hive and runs in a figure of eight on the comb. The angle of the "
        "middle run against the vertical gives the direction of the flowers against the sun, "
        "and the length of the run gives the distance. Other bees follow the dancer in the "
        "dark, feel the movement, and then fly straight to the place. Karl von Frisch worked "
        "this out over decades of patient observation, and shared a Nobel prize for it in "
        "1973.",
        SUMMARY + "The town council voted on Monday to close the riverside road to cars on Sundays "
        "from May to September. Shop owners were divided: cafés expect more guests, while "
        "the garden centre fears that customers with heavy goods will stay away. The council "
        "will count visitors at four points and decide in October whether to continue next "
        "year.",
        SUMMARY
        + "A lithium-ion cell ages in two ways. Calendar ageing goes on all the time and is "
        "faster when the cell is warm and full. Cycle ageing comes from use and is faster "
        "with deep discharges and high currents. Someone who wants a phone battery to last "
        "should therefore keep it cool, avoid leaving it at one hundred percent overnight, "
        "and charge little and often.",
        SUMMARY + "Thank you all for coming. We agreed on three things. First, Priya sends the new "
        "price list to the distributors by Friday. Second, the packaging change waits until "
        "the stock of old boxes is used up, which Marek expects in six weeks. Third, we meet "
        "again on the 14th, without the agency, to look at the first sales figures before "
        "anything else is printed.",
        SUMMARY + "The lighthouse was built in 1821 of local granite, after the wreck of the grain "
        "ship Marigold in which nineteen people drowned. Its lamp burned whale oil, then "
        "paraffin, and from 1934 used electricity. The last keeper left in 1988. Since then "
        "a volunteer society has repainted the tower every third summer and opens it to "
        "visitors on bank holidays.",
        "Give this paragraph a title of at most six words.\n\nFor two years the library has "
        "lent out more than books. Drills, sewing machines, a telescope and an ice-cream "
        "maker can be borrowed for a week. Eight hundred people have done so, and only one "
        "waffle iron never came back.",
        "Turn this paragraph into three bullet points.\n\nBefore the first frost, empty the "
        "garden hose and store it inside. Cut back what is dead, but leave seed heads for "
        "the birds. Cover young trees with fleece, and raise pots off the ground so that "
        "water can drain away.",
        "Explain this sentence in plain words: The parties shall indemnify and hold each "
        "other harmless against any third-party claim arising from a breach of this "
        "agreement.",
        "What is the main complaint in this letter? Answer in one sentence.\n\nDear "
        "neighbours, I enjoy music myself, and I know the walls are thin. But for three "
        "weeks now the drums have started at eleven at night. My daughter has school at "
        "seven. I have rung twice and nobody opened. Could we find an hour that suits us "
        "both?",
    ],
    "extract": [
        "Extract the date, the place and the time as JSON with the keys date, place and "
        "time.\n\nThe annual meeting will be held on 3 March 2025 in the village hall, "
        "starting at 19:30.",
        "List every person named in this text, separated by commas.\n\nAfter the concert Ms "
        "Okafor introduced the young violinist Lena Brandt to the conductor, Tomás Rivera, "
        "who had already heard of her from his old teacher, Professor Lindqvist.",
        "Extract the total amount and the currency: Invoice 2291. Two chairs at 149.00, one "
        "lamp at 79.50, delivery 20.00. Total due within 30 days: 397.50 EUR.",
        "Which ingredients does this recipe need? One per line.\n\nMelt the butter with the "
        "sugar, stir in the oats and a pinch of salt, press into a tin and bake until golden.",
        "Extract the phone number: You can reach the surgery on 0131 496 0182 between eight "
        "and six, or write to reception at any time.",
        "Extract the product, the fault and the wish of the customer as JSON.\n\nHello, I "
        "bought the ClearView 27 monitor in June. Since last week there is a green line down "
        "the left side. I do not want a repair again, please send me the money back. "
        "Regards, J. Moreau",
        "Write these measurements as CSV with the columns city, high and low.\n\nIn Oslo it "
        "reached 4 degrees and fell to -3 at night. Porto had 17 and 11. In Athens the high "
        "was 19, the low 12.",
        "What is the unit price in this line? '12 x notebook A5 squared, 38.40 in total'",
        "Find the spelling mistakes in this sentence and list them: The comittee recieved "
        "there aplication on Wensday.",
    ],
    "answer": [
        "What is the capital of Australia?",
        "Why is the sky blue? Explain it to a ten-year-old.",
        "How many minutes are there in a week?",
        "What is the difference between weather and climate?",
        "Who wrote Pride and Prejudice, and when was it first published?",
        "Why do we have leap years?",
        "A shirt costs 40 euros and is reduced by 15 percent. What does it cost now? Show "
        "the steps.",
        "Name three rivers in Africa.",
        "What should I check before I buy a used bicycle?",
        "Is a tomato a fruit or a vegetable? Give the botanical and the kitchen answer.",
        "How does a vaccine work? Answer in three sentences.",
        "Hi",
        "Which is heavier, a kilogram of iron or a kilogram of feathers, and why do people "
        "get it wrong?",
        "I sleep badly before exams. Give me four practical tips.",
    ],
    "code": [
        "Write a Python function that returns the n-th Fibonacci number.",
        "What does this Python expression give? sorted('banana', reverse=True)[:3]",
        "Write a SQL query that counts the orders of each customer in the table orders(id, "
        "customer_id, total), largest count first.",
        "Explain this shell command: find . -name '*.log' -mtime +30 -delete",
        "Write a regular expression that matches a date like 2024-06-30.",
        "Find the bug.\n\ndef mean(values):\n    total = 0\n    for value in "
        "values:\n        total = value\n    return total / len(values)",
        "Write a docstring for this function.\n\ndef clamp(x, low, high):\n    return "
        "max(low, min(x, high))",
    ],
    "write": [
        "Write a polite reply that declines an invitation to a wedding because of a work trip.",
        "Write a haiku about the first snow.",
        "Write two sentences that advertise a small bakery's rye bread, without using the "
        "word 'best'.",
        "Rewrite this so that it sounds friendly: Your form is incomplete. Send the missing "
        "pages or we close the case.",
        "Suggest five names for a cat that is completely grey.",
    ],
}

SYSTEM = "You answer in one short sentence."


def main() -> None:
    """Writes both files."""
    here = Path(__file__).parent
    rows = [(category, prompt) for category, prompts in PROMPTS.items() for prompt in prompts]
    # Categories take turns, as in a file that grew over time: neighbours differ in length.
    rows.sort(key=lambda row: PROMPTS[row[0]].index(row[1]))
    table = pa.table(
        {
            "id": pa.array(range(len(rows)), pa.int32()),
            "category": [category for category, _ in rows],
            "prompt": [prompt for _, prompt in rows],
        }
    )
    pq.write_table(table, here / "prompts.parquet")
    with (here / "messages.jsonl").open("w", encoding="utf-8") as file:
        for index, question in enumerate(PROMPTS["answer"][:8]):
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
            ]
            file.write(json.dumps({"id": index, "messages": messages}) + "\n")
    print(f"{table.num_rows} prompts in {here / 'prompts.parquet'}")


if __name__ == "__main__":
    main()
