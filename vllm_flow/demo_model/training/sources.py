"""Which published drawings and photo cut-outs show which class. Tables only. (pure)

Names stand for files of packages (see ``sprites``): emoji sets of ``@iconify-json`` on npm, and the
Debian packages ``tuxpaint-stamps-default`` and ``openclipart-png``.
"""

from __future__ import annotations

SEEN_SETS = ("noto", "twemoji", "fluent-emoji-flat")
"""Emoji sets that training draws from and shipped pictures of the seen style are made of."""
FURTHER_SETS = ("emojione", "fxemoji")
"""Emoji sets for training alone; what a set lacks is left out."""
UNSEEN_SET = "openmoji"
"""The emoji set that training never draws from."""

EMOJI: dict[str, str] = {
    "dog": "dog dog-face guide-dog poodle service-dog",
    "cat": "cat cat-face black-cat",
    "bird": "bird eagle dove parrot duck swan owl rooster flamingo goose turkey peacock",
    "horse": "horse horse-face",
    "sheep": "ewe ram goat",
    "cow": "cow cow-face ox",
    "elephant": "elephant",
    "bear": "bear polar-bear panda",
    "zebra": "zebra",
    "giraffe": "giraffe",
    "rabbit": "rabbit rabbit-face",
    "fish": "fish tropical-fish blowfish",
    "butterfly": "butterfly",
    "frog": "frog",
    "turtle": "turtle",
    "pig": "pig pig-face boar",
    "car": "automobile oncoming-automobile sport-utility-vehicle taxi oncoming-taxi police-car",
    "bus": "bus oncoming-bus trolleybus",
    "train": "locomotive train high-speed-train bullet-train",
    "truck": "delivery-truck articulated-lorry fire-engine pickup-truck",
    "boat": "sailboat speedboat motor-boat ship",
    "bicycle": "bicycle",
    "motorcycle": "motorcycle motor-scooter",
    "airplane": "airplane small-airplane",
    "helicopter": "helicopter",
    "rocket": "rocket",
    "apple": "red-apple green-apple",
    "banana": "banana",
    "orange": "tangerine",
    "broccoli": "broccoli",
    "carrot": "carrot",
    "hot dog": "hot-dog",
    "pizza": "pizza",
    "donut": "doughnut",
    "cake": "shortcake birthday-cake cupcake",
    "sandwich": "sandwich",
    "strawberry": "strawberry",
    "pineapple": "pineapple",
    "tomato": "tomato",
    "mushroom": "mushroom",
    "bottle": "bottle-with-popping-cork lotion-bottle baby-bottle",
    "wine glass": "wine-glass",
    "cup": "hot-beverage teacup-without-handle",
    "knife": "kitchen-knife",
    "spoon": "spoon",
    "chair": "chair",
    "couch": "couch-and-lamp",
    "bed": "bed",
    "toilet": "toilet",
    "tv": "television",
    "laptop": "laptop",
    "keyboard": "keyboard",
    "mouse": "computer-mouse",
    "cell phone": "mobile-phone",
    "camera": "camera camera-with-flash",
    "clock": "alarm-clock mantelpiece-clock three-oclock ten-oclock",
    "ball": "soccer-ball basketball baseball volleyball",
    "kite": "kite",
    "skateboard": "skateboard",
    "teddy bear": "teddy-bear",
    "tree": "deciduous-tree evergreen-tree palm-tree christmas-tree",
    "flower": "sunflower tulip rose hibiscus blossom cherry-blossom",
    "potted plant": "potted-plant",
    "umbrella": "umbrella umbrella-with-rain-drops closed-umbrella",
    "backpack": "backpack",
    "handbag": "handbag clutch-bag",
    "tie": "necktie",
    "book": "closed-book blue-book green-book orange-book open-book",
    "key": "key old-key",
    "scissors": "scissors",
    "toothbrush": "toothbrush",
    "traffic light": "vertical-traffic-light horizontal-traffic-light",
    "guitar": "guitar",
}
"""Class -> names of the drawings in the emoji sets."""

PHOTOS: dict[str, str] = {
    "dog": "animals/mammals/dogs/dog animals/mammals/dogs/dingo",
    "bird": "animals/birds/adelaide-rosella animals/birds/blackbird animals/birds/chicken_profile "
    "animals/birds/crow animals/birds/crowned_crane animals/birds/cuckoo animals/birds/drake "
    "animals/birds/duck animals/birds/gander animals/birds/guineafowl animals/birds/hen "
    "animals/birds/heron_greatblue animals/birds/lark animals/birds/magpie animals/birds/ostrich "
    "animals/birds/owl animals/birds/peacock animals/birds/pelican animals/birds/pigeon "
    "animals/birds/pink_flamingo animals/birds/rainbow-lorikeet animals/birds/rooster "
    "animals/birds/seagull animals/birds/silver-gull animals/birds/turkey animals/birds/vulture",
    "horse": "animals/mammals/equines/horse",
    "sheep": "animals/mammals/bovines/goat animals/mammals/bovines/mountaingoat "
    "animals/mammals/bovines/ram animals/mammals/bovines/sheep animals/mammals/bovines/sheep_lamb",
    "cow": "animals/mammals/bovines/bull animals/mammals/bovines/cow "
    "animals/mammals/bovines/cow_white animals/mammals/bovines/zebu",
    "elephant": "animals/mammals/elephant",
    "bear": "animals/mammals/bears/bear animals/mammals/bears/european-bear",
    "zebra": "animals/mammals/equines/zebra",
    "giraffe": "animals/mammals/giraffe",
    "rabbit": "animals/mammals/rabbit_little animals/mammals/rodents/rabbit "
    "animals/mammals/rodents/rabbit-2",
    "fish": "animals/fish/bluegroper animals/fish/butterflyfish animals/fish/clownfish "
    "animals/fish/coraltrout animals/fish/dolphinfish animals/fish/lionfish "
    "animals/fish/moonwrasse animals/fish/stripedfish",
    "frog": "animals/amphibians/frog-1 animals/amphibians/frog",
    "pig": "animals/mammals/pig animals/mammals/pig_golden animals/mammals/pig_golden2",
    "car": "vehicles/auto/beetle vehicles/auto/sedan vehicles/auto/sportscar2",
    "truck": "vehicles/auto/truck vehicles/emergency/firetruck vehicles/garbagetruck",
    "boat": "vehicles/ship/chineseJunk vehicles/ship/walnutBoat",
    "airplane": "vehicles/flight/planes/747 military/vehicles/f22_raptor",
    "apple": "food/fruit/apple_fuji food/fruit/apple_granny_smith food/fruit/apple_green "
    "food/fruit/apple_red food/fruit/apple_sierra_beauty",
    "banana": "food/fruit/banana",
    "orange": "food/fruit/mandarine food/fruit/orange food/fruit/orange_seville",
    "broccoli": "food/vegetables/broccoli",
    "carrot": "food/vegetables/carrot",
    "pizza": "food/pizza",
    "strawberry": "food/fruit/Strawberry2 food/fruit/strawberry",
    "pineapple": "food/fruit/pineapple",
    "tomato": "food/vegetables/tomato",
    "mushroom": "food/vegetables/mushroom plants/mushrooms/cep plants/mushrooms/cep-1 "
    "plants/mushrooms/cep-2",
    "cup": "household/dishes/mug",
    "toilet": "household/toilet",
    "camera": "hobbies/camera_35mm",
    "clock": "symbols/clockface",
    "ball": "sports/basketball sports/cricketball sports/soccer sports/tennis_ball",
    "teddy bear": "animals/mammals/bears/toys/edward_bear",
    "tree": "plants/trees/birch plants/trees/holm_oak plants/trees/liberia-palm plants/trees/tree336 "
    "seasonal/christmas/Christmas_Tree_photo",
    "flower": "plants/flowers/anemone_red plants/flowers/daffodil plants/flowers/flower1 "
    "plants/flowers/flower2 plants/flowers/flower3 plants/flowers/flower5 plants/flowers/flower6 "
    "plants/flowers/flower8 plants/flowers/flower10 plants/flowers/iris plants/flowers/marigold "
    "plants/flowers/red-gazania plants/flowers/rose plants/flowers/whitestar-petunia "
    "plants/flowers/yellow-flower",
    "key": "household/key",
    "scissors": "household/arttools/scissors_small_closed household/arttools/scissors_small_open",
    "guitar": "hobbies/music/string/guitar2 hobbies/music/string/guitar_classical "
    "hobbies/music/string/guitar_electric hobbies/music/string/guitar_electric_bass",
}
"""Class -> photo cut-outs among Tux Paint's stamps (GPL-2: for training, never shipped)."""

STAMPS: dict[str, str] = {
    "cat": "animals/mammals/cats/kitten",
    "bird": "animals/birds/swallow seasonal/easter/bluebird seasonal/easter/chick",
    "zebra": "animals/mammals/equines/zebra2",
    "rabbit": "seasonal/easter/bunny",
    "butterfly": "animals/insects/cartoon/butterfly animals/insects/cartoon/monarchbutterfly "
    "seasonal/easter/butterfly",
    "car": "vehicles/auto/sportscar vehicles/auto/sportscar3 military/vehicles/mustang",
    "bus": "vehicles/masstransit/green_korean_bus vehicles/iso_bus "
    "vehicles/masstransit/cartoon/double_decker_bus vehicles/masstransit/cartoon/schoolbus",
    "train": "vehicles/locomotive/white_train vehicles/locomotive/cartoon/toy_train",
    "truck": "vehicles/blue_truck vehicles/iso_lorry1 vehicles/iso_lorry2 vehicles/iso_lorry3 "
    "vehicles/iso_lorry4 vehicles/toy_truck vehicles/iso_fireengine",
    "boat": "vehicles/ship/sail_boat1 vehicles/ship/sail_boat2 vehicles/ship/cartoon/tugboat",
    "bicycle": "vehicles/cycle/bluebike",
    "motorcycle": "vehicles/cycle/motorbike",
    "airplane": "vehicles/flight/planes/plane vehicles/flight/planes/cartoon/plane",
    "helicopter": "vehicles/flight/cartoon/eddieCopter",
    "rocket": "space/rocket1 space/rocket2 space/rocket3 space/rocket4 space/rocket5",
    "apple": "food/fruit/cartoon/apple",
    "banana": "food/fruit/cartoon/banana",
    "orange": "food/fruit/cartoon/orange",
    "cake": "food/dessert/cartoon/birthday_cake food/dessert/cartoon/pink_cake "
    "food/dessert/smallcake",
    "strawberry": "food/fruit/cartoon/strawberry",
    "pineapple": "food/fruit/cartoon/pineapple",
    "bottle": "household/dishes/bottle",
    "cup": "household/dishes/coffeecup household/dishes/expresso",
    "knife": "household/dishes/knife",
    "spoon": "household/dishes/spoon household/dishes/cartoon/spoon",
    "tv": "household/electronics/monitor",
    "laptop": "household/electronics/laptop",
    "mouse": "household/electronics/mouse",
    "cell phone": "household/electronics/mobile",
    "camera": "household/electronics/camera household/electronics/digitalcamera "
    "household/electronics/DSLR_Camera",
    "clock": "symbols/clock",
    "ball": "sports/cartoon/volleyball",
    "kite": "hobbies/kite",
    "teddy bear": "animals/mammals/bears/cartoon/teddy_bear",
    "tree": "seasonal/christmas/tree",
    "umbrella": "household/umbrella",
    "handbag": "clothes/red_handbag",
    "guitar": "hobbies/music/string/guitar_electric_bass2",
}
"""Class -> drawings among Tux Paint's stamps (GPL-2: for training, never shipped)."""

CLIPART: dict[str, str] = {
    "dog": "animals/mammals/dogs/bulldog_puppy_ganson animals/mammals/dogs/bored_dog_01 "
    "animals/mammals/dogs/beagle_copper_ganson animals/mammals/dogs/black_lab_ganson",
    "cat": "animals/mammals/housecats/gatto_cat_architetto_fra_01 "
    "animals/mammals/housecats/gatto_cat_architetto_fra_02 "
    "animals/mammals/housecats/gatto_cat_architetto_fra_03 "
    "animals/mammals/housecats/gatto_cat_architetto_fra_04 "
    "animals/mammals/housecats/gattina_cat_architetto_f_01 "
    "animals/mammals/housecats/kitten_gerald_g._01 "
    "animals/mammals/cartoon_cat_gerald_g._01 "
    "animals/mammals/housecats/gatto_nero_architetto_fr_01",
    "horse": "animals/mammals/horses/cavallo_architetto_franc_01 "
    "animals/mammals/horses/cavallo_architetto_franc_02 "
    "animals/mammals/horses/cavallo_architetto_franc_03 "
    "animals/mammals/horses/cavallo_architetto_franc_05 "
    "animals/mammals/horses/horse_1_konstantin_r._01 "
    "animals/mammals/horses/horse_2_konstantin_r._01",
    "sheep": "animals/mammals/sheep-md-v0.1 animals/mammals/dall_sheep_ram_ganson",
    "cow": "animals/mammals/bull_utrescu_",
    "elephant": "animals/mammals/elephant_01",
    "bear": "animals/mammals/bears/orso_architetto_francesc_01 "
    "animals/mammals/bears/orso_architetto_francesc_02 "
    "animals/mammals/bears/orso_architetto_francesc_03",
    "fish": "animals/fish/brown_fish_01 animals/fish/altum_angelfish_01 "
    "animals/fish/yellow_gourami_01 animals/fish/pescetto_arancione_archi_01 "
    "animals/fish/clown_loach_01 animals/fish/giraffe_cichlid_01",
    "butterfly": "animals/bugs/farfalla_butterfly_fra1 animals/bugs/butterfly_jonvdveen_01 "
    "animals/bugs/butterfly_jonathan_dietr_01",
    "frog": "animals/red-eye_frog_mirko_maisc_01",
    "turtle": "animals/turtle_jurgen_gaeremyn_01",
    "pig": "animals/mammals/a_simple_pig_01 animals/mammals/pig_marcelo_caiafa1",
    "car": "transportation/vehicles/redcar_marcelo_caiafa_ "
    "transportation/vehicles/skoda_car_alejandro_teja_ transportation/vehicles/car "
    "transportation/vehicles/old_car_lumen_design_st_r "
    "transportation/vehicles/hummer_01 transportation/car_jamin_ellis_",
    "bus": "transportation/vehicles/bus1_jarno_vasamaa_01 "
    "transportation/vehicles/bus2_jarno_vasamaa_01 transportation/vehicles/bus_01",
    "truck": "transportation/vehicles/small_truck_steffen_gluc_01 "
    "transportation/vehicles/big_truck_01 transportation/truck_jarno_vasamaa_",
    "boat": "transportation/boating/boat_jarno_vasamaa_ transportation/vehicles/trawler_01",
    "bicycle": "transportation/vehicles/bicycle_01 transportation/bike_tobias_jakobs_ "
    "transportation/bicycle_philippe_colin_01",
    "motorcycle": "transportation/motorcycle_jarno_vasama_",
    "airplane": "transportation/vehicles/aircraft_jarno_vasamaa_ "
    "transportation/vehicles/airplane_nicu_buculei_01 "
    "transportation/vehicles/military_airplane_mo_01",
    "rocket": "transportation/vehicles/rocket",
    "apple": "food/fruit/an_apple_01 food/fruit/apple food/fruit/another_apple_01",
    "banana": "food/fruit/bananas_nicu_buculei_01 food/fruit/banana",
    "orange": "food/fruit/orange_simple food/fruit/orange food/fruit/orange_dave_pena_01",
    "hot dog": "food/meats_and_eggs/hot_dog food/meats_and_eggs/hot_dog_juliane_krug_r",
    "pizza": "food/pizza_4_stagioni_archite_01 food/pizza_cheese food/pizza_pepperoni "
    "food/pizza_slice_01",
    "cake": "food/desserts/birthday_cake food/desserts/pink_cake_gabrielle_now_r "
    "food/desserts/cake_jarno_vasamaa_r",
    "sandwich": "food/sandwich_one_jean-victor_01 food/submarine_sandwich_01",
    "strawberry": "food/fruit/strawberry food/fruit/strawberry_simple food/fruit/strawberry_01",
    "pineapple": "food/fruit/pineapple",
    "mushroom": "plants/mushroom_benji_park_ plants/mushroom",
    "bottle": "tools/bottle_jean_victor_balin_ food/beverages/alcohol/wine",
    "wine glass": "food/beverages/alcohol/wine_glass_christian_h._",
    "cup": "food/beverages/mug food/beverages/mug_toh_yen_cheng_01 "
    "food/beverages/teacup_ganson food/beverages/cuppa_schwoo_01",
    "chair": "buildings/furniture/sedia_in_legno_architett_01 "
    "buildings/furniture/poltrona_ufficio_archite_01",
    "couch": "buildings/furniture/soft_blue_couch_jonadab_01",
    "tv": "recreation/tv_01 electronics/television_alexander_d.__01 "
    "buildings/furniture/television_peterm_",
    "laptop": "computer/hardware/laptop_01 computer/hardware/laptop_02 computer/hardware/laptop",
    "keyboard": "computer/hardware/keyboard_01 computer/hardware/keyboard",
    "mouse": "computer/hardware/mouse computer/hardware/mouse2",
    "cell phone": "office/telephone/mobile_phone_01 office/telephone/cellular_phone_shandy_br_ "
    "office/telephone/sprint_cell_phone_joel_r",
    "camera": "electronics/camera_michael_tunniclif_01 "
    "computer/hardware/digital_camera_nicu_bucu_01",
    "ball": "recreation/sports/soccer_ball_ganson recreation/sports/volley-ball_andrea_bianc_01",
    "teddy bear": "recreation/toys/simple_teddy_bear_gerald_01 "
    "recreation/toys/teddybear_jarno_vasamaa_ "
    "recreation/toys/stylized_teddy_bear_gera_01",
    "tree": "plants/trees/tree_01 plants/trees/evergreen/plain_tree_01 "
    "plants/trees/palmtree_b_r_kessels_ plants/trees/cartoon_tree_01",
    "flower": "plants/flowers/flower_01 plants/flowers/red_flower_01 "
    "plants/flowers/red_flower_03 plants/flowers/tulips_ganson "
    "plants/flowers/daisy_jonathan_dietrich_01",
    "potted plant": "plants/flowers/flowerandpot_daniel_ste_r",
    "umbrella": "tools/umbrella",
    "tie": "people/clothing/tie_-_clothing_nicu_bucu_01",
    "book": "education/books/book_01 education/books/book_02 education/books/closed_book_01 "
    "education/books/open_book_01",
    "scissors": "tools/scissors tools/scissors_02 tools/scissors_03",
    "guitar": "recreation/music/electric_guitar_andrea__01r "
    "recreation/music/guitar_jarno_vasamaa1 recreation/music/guitar_ganson",
}
"""Class -> drawings of openclipart-png (public domain)."""


def held_out(names: list[str]) -> list[str]:
    """The photo files of a class that training never sees: one in four, none of a single one."""
    return names[1::4] if len(names) > 1 else []
