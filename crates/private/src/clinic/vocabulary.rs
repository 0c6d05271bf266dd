//! Words of the records. Names of conditions and drugs are the usual ones; how often they occur and
//! together with what is made up, so that text looks plausible and means nothing.

/// A lasting condition and what is prescribed for it.
pub(super) struct Condition {
    pub name: &'static str,
    /// Log-odds at age 60, HbA1c 7 % and eGFR 90.
    pub base: f64,
    /// Log-odds by decade of age, by point of HbA1c, by 30 mL/min of eGFR lost.
    pub slopes: [f64; 3],
    /// One of these when it is treated.
    pub drugs: &'static [&'static str],
}

const fn condition(
    name: &'static str,
    base: f64,
    slopes: [f64; 3],
    drugs: &'static [&'static str],
) -> Condition {
    Condition { name, base, slopes, drugs }
}

/// Lasting conditions besides diabetes itself.
#[rustfmt::skip]
pub(super) const CONDITIONS: &[Condition] = &[
    condition("essential hypertension", 0.6, [0.35, 0.05, 0.4], &["lisinopril 10 mg daily", "lisinopril 20 mg daily", "losartan 50 mg daily", "amlodipine 5 mg daily", "hydrochlorothiazide 25 mg daily"]),
    condition("hyperlipidaemia", 0.3, [0.15, 0.10, 0.0], &["atorvastatin 20 mg at night", "atorvastatin 40 mg at night", "simvastatin 20 mg at night", "rosuvastatin 10 mg daily"]),
    condition("congestive heart failure", -2.0, [0.55, 0.10, 0.5], &["furosemide 40 mg daily", "furosemide 20 mg twice daily", "carvedilol 6.25 mg twice daily", "spironolactone 25 mg daily"]),
    condition("coronary artery disease", -1.4, [0.50, 0.12, 0.2], &["aspirin 81 mg daily", "metoprolol 50 mg twice daily", "clopidogrel 75 mg daily", "isosorbide mononitrate 30 mg daily"]),
    condition("atrial fibrillation", -2.2, [0.65, 0.0, 0.2], &["apixaban 5 mg twice daily", "warfarin 5 mg daily", "diltiazem 120 mg daily", "digoxin 0.125 mg daily"]),
    condition("chronic kidney disease", -3.2, [0.15, 0.15, 1.9], &["sevelamer 800 mg with meals", "calcitriol 0.25 mcg daily", "sodium bicarbonate 650 mg twice daily"]),
    condition("diabetic retinopathy", -2.3, [0.05, 0.35, 0.3], &[]),
    condition("diabetic neuropathy", -1.7, [0.15, 0.35, 0.2], &["gabapentin 300 mg three times daily", "pregabalin 75 mg twice daily", "duloxetine 30 mg daily"]),
    condition("peripheral vascular disease", -2.4, [0.45, 0.25, 0.3], &["cilostazol 100 mg twice daily"]),
    condition("obesity", -0.5, [-0.30, 0.15, -0.1], &[]),
    condition("chronic obstructive pulmonary disease", -1.9, [0.30, 0.0, 0.0], &["tiotropium inhaler daily", "albuterol inhaler as needed", "fluticasone and salmeterol inhaler twice daily"]),
    condition("asthma", -2.3, [-0.25, 0.0, 0.0], &["albuterol inhaler as needed", "montelukast 10 mg at night"]),
    condition("obstructive sleep apnoea", -2.0, [-0.05, 0.10, 0.0], &[]),
    condition("gastro-oesophageal reflux", -1.2, [0.05, 0.0, 0.0], &["omeprazole 20 mg daily", "pantoprazole 40 mg daily", "famotidine 20 mg twice daily"]),
    condition("hypothyroidism", -2.0, [0.15, 0.0, 0.0], &["levothyroxine 50 mcg daily", "levothyroxine 75 mcg daily", "levothyroxine 100 mcg daily"]),
    condition("depression", -1.7, [-0.15, 0.10, 0.0], &["sertraline 50 mg daily", "citalopram 20 mg daily", "mirtazapine 15 mg at night"]),
    condition("anxiety disorder", -2.3, [-0.20, 0.0, 0.0], &["buspirone 10 mg twice daily", "escitalopram 10 mg daily"]),
    condition("osteoarthritis", -1.5, [0.40, 0.0, 0.0], &["acetaminophen 650 mg as needed", "topical diclofenac"]),
    condition("osteoporosis", -3.0, [0.60, 0.0, 0.0], &["alendronate 70 mg weekly", "calcium with vitamin D daily"]),
    condition("anaemia of chronic disease", -2.6, [0.20, 0.0, 0.9], &["ferrous sulfate 325 mg daily", "darbepoetin every two weeks"]),
    condition("gout", -2.8, [0.20, 0.0, 0.6], &["allopurinol 100 mg daily", "allopurinol 300 mg daily", "colchicine 0.6 mg daily"]),
    condition("old stroke", -2.8, [0.50, 0.12, 0.2], &["aspirin 81 mg daily", "clopidogrel 75 mg daily"]),
    condition("dementia", -4.2, [1.00, 0.0, 0.1], &["donepezil 5 mg at night", "memantine 10 mg twice daily"]),
    condition("benign prostatic hyperplasia", -3.0, [0.60, 0.0, 0.0], &["tamsulosin 0.4 mg daily", "finasteride 5 mg daily"]),
    condition("fatty liver disease", -2.2, [-0.15, 0.20, 0.0], &[]),
    condition("hepatitis C", -4.0, [-0.20, 0.0, 0.0], &[]),
    condition("tobacco use", -1.6, [-0.35, 0.05, 0.0], &["nicotine patch 14 mg daily"]),
    condition("epilepsy", -4.0, [-0.10, 0.0, 0.0], &["levetiracetam 500 mg twice daily"]),
];

/// Why somebody comes, how often (relative), how many days it takes, and how much it raises the
/// glucose in mg/dL.
#[rustfmt::skip]
pub(super) const REASONS: &[(&str, f64, f64, f64)] = &[
    ("hyperglycaemia without ketosis", 9.0, 3.0, 140.0),
    ("diabetic ketoacidosis", 3.0, 4.5, 260.0),
    ("hypoglycaemia", 4.0, 2.0, -90.0),
    ("chest pain", 10.0, 2.0, 5.0),
    ("worsening heart failure", 8.0, 5.0, 15.0),
    ("acute myocardial infarction", 4.0, 5.5, 40.0),
    ("community-acquired pneumonia", 7.0, 5.0, 45.0),
    ("urinary tract infection", 6.0, 3.5, 35.0),
    ("cellulitis of the leg", 6.0, 4.5, 40.0),
    ("infected foot ulcer", 4.0, 7.5, 60.0),
    ("osteomyelitis of the foot", 2.0, 9.0, 60.0),
    ("acute kidney injury", 5.0, 5.0, 10.0),
    ("hyperkalaemia", 2.0, 2.5, 5.0),
    ("syncope", 4.0, 2.0, 0.0),
    ("acute ischaemic stroke", 3.0, 6.0, 30.0),
    ("exacerbation of chronic bronchitis", 5.0, 4.5, 50.0),
    ("gastrointestinal bleeding", 3.0, 4.0, 10.0),
    ("acute pancreatitis", 2.0, 5.0, 60.0),
    ("sepsis", 3.0, 9.0, 70.0),
    ("hip fracture after a fall", 2.0, 6.5, 20.0),
    ("elective joint replacement", 4.0, 3.5, 15.0),
    ("dehydration", 4.0, 2.5, 20.0),
];

/// Drugs for diabetes, with what of HbA1c they go with.
pub(super) const SUGAR_DRUGS: &[(&str, f64)] = &[
    ("metformin 500 mg twice daily", 6.6),
    ("metformin 1000 mg twice daily", 7.4),
    ("glipizide 5 mg daily", 7.6),
    ("glimepiride 2 mg daily", 7.8),
    ("pioglitazone 30 mg daily", 7.9),
    ("sitagliptin 100 mg daily", 7.7),
    ("empagliflozin 10 mg daily", 7.8),
    ("liraglutide 1.2 mg daily", 8.2),
    ("insulin glargine 18 units at night", 8.8),
    ("insulin glargine 32 units at night", 9.6),
    ("insulin lispro with meals", 9.8),
    ("insulin NPH 20 units twice daily", 9.4),
];

pub(super) const CHANGES: &[&str] = &["unchanged", "raised", "lowered", "newly started", "stopped"];

pub(super) const ADMISSIONS: &[&str] = &[
    "from the emergency room",
    "after referral by a physician",
    "by transfer from another hospital",
    "as planned",
];

pub(super) const COURSES: &[&str] = &[
    "The course was without complications",
    "Treatment was adjusted after the first day",
    "Symptoms settled slowly",
    "The patient improved on intravenous treatment",
    "A short stay in intensive care was needed",
    "Specialists were consulted and agreed with the plan",
];

pub(super) const SPECIALTIES: &[&str] = &[
    "internal medicine",
    "family practice",
    "cardiology",
    "endocrinology",
    "nephrology",
    "general surgery",
    "orthopaedics",
    "pulmonology",
];

/// Where people go, from the lightest to the worst.
pub(super) const DISCHARGES: &[&str] = &[
    "home",
    "home with nursing visits",
    "to a rehabilitation hospital",
    "to a nursing home",
    "to hospice care",
];
